import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qcompile import tensors, weights
from qcompile.errors import ShapeError
from qcompile.model_reader import load_model
from qcompile.weights import columns_of, concat_columns, rows_of, transposed
from qcompile.weights_writer import save_model
from tests.graphs_on_disk import model_of
from tests.graphs_on_disk import weight as stored_weight


def weight(rows, columns, seed):
    return ir.tensor(np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32))


def test_packed_columns_equal_numpy_in_any_window():
    parts = [weight(6, n, seed) for seed, n in enumerate((4, 2, 5))]
    packed = concat_columns(parts)
    whole = np.concatenate([p.numpy() for p in parts], axis=1)
    assert np.array_equal(packed.numpy(), whole)
    for start in range(11):
        for stop in range(start + 1, 12):
            assert np.array_equal(columns_of(packed, start, stop), whole[:, start:stop].T)
    assert np.array_equal(rows_of(packed, 2, 5), whole[2:5])


def test_packing_of_packed_and_transposed_weights():
    inner = concat_columns([weight(3, 2, 0), weight(3, 3, 1)])
    outer = concat_columns([inner, transposed(weight(4, 3, 2))])
    assert outer.numpy().shape == (3, 9)
    assert np.array_equal(columns_of(outer, 1, 8), outer.numpy()[:, 1:8].T)


def test_transposed_equals_numpy():
    source = weight(5, 7, 3)
    assert np.array_equal(transposed(source).numpy(), source.numpy().T)


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match="cannot be packed"):
        concat_columns([weight(3, 2, 0), weight(4, 2, 1)])
    with pytest.raises(ShapeError, match="wanted a matrix"):
        transposed(ir.tensor(np.ones(3, np.float32)))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_columns_of_a_large_matrix_on_disk_are_read_and_not_mapped(tmp_path, monkeypatch, dtype):
    array = np.random.default_rng(0).standard_normal((70, 50)).astype(dtype)
    save_model(model_of(ir.Tensor(array, name="w")), tmp_path / "model.onnx")
    tensor = stored_weight(load_model(tmp_path / "model.onnx"), "w")
    monkeypatch.setattr(weights, "_LARGE_BYTES", 0)
    monkeypatch.delattr(tensors.DataFile, "map")
    for start, stop in ((0, 1), (7, 33), (49, 50), (0, 50)):
        taken = columns_of(tensor, start, stop)
        assert taken.dtype == dtype
        assert np.array_equal(taken, array[:, start:stop].T)
        assert np.array_equal(transposed(tensor).rows(start, stop), array[:, start:stop].T)
