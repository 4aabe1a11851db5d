"""NaN and infinite weights are refused by their name in the file, wherever they are."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.artifact import load_model
from qcompile.calibration.trial import Trials
from qcompile.errors import QuantError
from qcompile.passes import finite_weights
from qcompile.passes.finite_weights import check_finite
from qcompile.quantize_options import QuantizeOptions
from tests.optimized import export_changed, optimize_tiny

NORM = "model.layers.0.input_layernorm.weight"
BIAS = "model.layers.0.self_attn.k_proj.bias"
DOWN = "model.layers.1.mlp.down_proj.weight"
GPTQ = QuantizeOptions(algorithm="gptq")


def exported_with(directory, name, index, value):
    return export_changed(directory, lambda tensors: tensors[name].__setitem__(index, value))


def put(graph, name, index, value, dtype=np.float32):
    tensor = graph.initializers[name].const_value
    array = tensor.numpy().astype(dtype)
    array[index] = value
    graph.initializers[name].const_value = ir.tensor(array, name=name)


@pytest.mark.parametrize("passes", [("int4",), ("int8-weight",), ("int8",), ("kv8",)])
@pytest.mark.parametrize(
    ("name", "value", "said"), [(NORM, np.nan, "element 3 is nan"), (BIAS, -np.inf, "element 3 is -inf")]
)
def test_norms_and_biases_are_looked_at_whatever_the_scheme(tmp_path, passes, name, value, said):
    source = exported_with(tmp_path, name, 3, value)
    with pytest.raises(QuantError, match=f"'{name}': {said}; .*repair the checkpoint") as caught:
        optimize_tiny(source, tmp_path / "out", "fuse", *passes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("passes", "options"),
    [
        (("int4",), GPTQ),
        (("int4",), QuantizeOptions(quality=0.02)),
        (("int4", "awq"), QuantizeOptions()),
        (("int8-dynamic", "smooth-quant"), QuantizeOptions()),
        (("int8-static",), QuantizeOptions()),
        (("int8",), QuantizeOptions()),
        (("kv8",), QuantizeOptions()),
    ],
)
def test_a_matrix_is_named_before_anything_is_computed_with_it(tmp_path, passes, options):
    source = exported_with(tmp_path, DOWN, (3, 5), np.inf)
    with pytest.raises(QuantError, match=f"'{DOWN}': row 3, input 5 is inf; "):
        optimize_tiny(source, tmp_path / "out", "fuse", *passes, quantize=options)


def test_a_quantizer_that_finds_it_says_how_to_keep_the_layer_float(tmp_path):
    source = exported_with(tmp_path, DOWN, (3, 5), np.nan)
    with pytest.raises(QuantError, match=r"row 3 has NaN .*--keep-float '([^']*down_proj[^']*)'") as caught:
        optimize_tiny(source, tmp_path / "out", "fuse", "int4")
    pattern = str(caught.value).split("'")[-2]
    report = optimize_tiny(
        source, tmp_path / "out", "fuse", "int4", quantize=QuantizeOptions(keep_float=(pattern,)), verify="off"
    )
    assert report.count("int4") == 9


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ir.DataType.BFLOAT16.numpy()])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_every_piece_of_every_type_is_looked_at(exported, monkeypatch, dtype, bad):
    graph = load_model(exported["qwen2"] / "model.onnx").graph
    name = next(n for n in graph.initializers if n.endswith("embed_tokens.weight"))
    put(graph, name, (0, 0), np.finfo(np.float16).max if dtype == np.float16 else 3e38, dtype)
    check_finite(graph, with_matrices=True)
    put(graph, name, (200, 7), bad, dtype)
    tensor = graph.initializers[name].const_value
    halves = np.array_split(tensor.numpy(), 2)
    monkeypatch.setattr(finite_weights, "pieces_of", lambda own: ((1, lambda a=a: a) for a in halves))
    assert finite_weights._first_not_finite(tensor)[0] == 200 * tensor.shape[1] + 7
    monkeypatch.undo()
    with pytest.raises(QuantError, match=f"'{name}': row 200, input 7 is {bad}"):
        check_finite(graph, with_matrices=True)
    check_finite(graph, with_matrices=False)


def test_masks_may_be_infinite(exported):
    graph = load_model(exported["qwen2"] / "model.onnx").graph
    mask = ir.tensor(np.full((4, 4), -np.inf, np.float32), name="mask")
    graph.register_initializer(ir.Value(name="mask", shape=ir.Shape([4, 4]), const_value=mask))
    lowest = ir.tensor(np.array([-np.inf], np.float32), name="lowest")
    graph.register_initializer(ir.Value(name="lowest", shape=ir.Shape([1]), const_value=lowest))
    check_finite(graph, with_matrices=True)


def test_values_that_overflow_are_named_when_bits_are_chosen(exported):
    model = load_model(exported["qwen2"] / "model.onnx")
    put(model.graph, NORM, slice(None), 3e38)
    with pytest.raises(QuantError, match=r"sensitivity: 'layers\.0\.[^']*' has NaN or infinite values") as caught:
        Trials(model, [np.arange(1, 9)])
    assert "layers.0." in str(caught.value)
