"""Weights stored twice: compared bit by bit, in any place, and a tied head read from the embedding table."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qcompile.artifact import load_model, save_model
from qcompile.passes import deduplicate_initializers
from qcompile.passes.base import PassContext, PassResult
from qcompile.passes.deduplicate_initializers import DeduplicateInitializers
from qcompile.passes.fold_constants import FoldConstants
from qcompile.passes.schedule import schedule
from tests.passes.graph_text import read_graph

TIED = "(int64[B, S] ids) => (float[B, S, 640] logits) { hidden = Gather (table, ids) logits = MatMul (hidden, head) }"
TABLE = np.random.default_rng(0).standard_normal((640, 64)).astype(np.float32)


def tied(table: np.ndarray = TABLE, head: np.ndarray | None = None, text: str = TIED, dtype: str = "float") -> ir.Model:
    return read_graph(text, {"table": table, "head": np.ascontiguousarray(table.T if head is None else head)}, dtype)


def run(model: ir.Model) -> PassResult:
    return DeduplicateInitializers()(PassContext(model))


def saved(model: ir.Model, directory: Path) -> ir.Model:
    save_model(model, directory / "model.onnx")
    return load_model(directory / "model.onnx")


@pytest.fixture(params=["in memory", "on disk", "on disk, compared piece by piece"])
def place(request, tmp_path, monkeypatch):
    if request.param == "on disk, compared piece by piece":
        monkeypatch.setattr(deduplicate_initializers, "_SMALL_BYTES", 256)
        monkeypatch.setattr(deduplicate_initializers, "_PIECE_ELEMENTS", 1000)
    return (lambda model: model) if request.param == "in memory" else lambda model: saved(model, tmp_path)


@pytest.mark.parametrize("dtype", ["float", "float16", "bfloat16"])
def test_a_folded_transpose_of_the_embedding_becomes_the_table_again(place, dtype):
    model = place(tied(dtype=dtype))
    result = run(model)
    assert (result.matches, result.rewrites) == (1, 1)
    assert result.detail["tied"] == ["head is table transposed"]
    assert list(model.graph.initializers) == ["table"]
    assert sorted(n.op_type for n in model.graph) == ["Gather", "MatMul", "Transpose"]
    assert run(model).rewrites == 0


def changed(index: tuple[int, int]) -> np.ndarray:
    head = TABLE.T.copy()
    head[index] = np.nextafter(head[index], np.float32(9))
    return head


@pytest.mark.parametrize("index", [(0, 0), (50, 33), (63, 639)])
def test_one_bit_of_difference_keeps_both(place, index):
    model = place(tied(head=changed(index)))
    assert run(model).rewrites == 0
    assert set(model.graph.initializers) == {"table", "head"}


@pytest.mark.parametrize(
    ("text", "rewrites"),
    [
        (TIED.replace("logits = MatMul", "shown = Identity (head) logits = MatMul"), 0),
        (TIED.replace("hidden = Gather", "shown = Identity (table) hidden = Gather"), 1),
    ],
    ids=["the head is read elsewhere", "the table is read elsewhere"],
)
def test_only_a_head_that_nobody_else_reads_is_tied(text, rewrites):
    assert run(tied(text=text)).rewrites == rewrites


def test_without_a_lookup_nothing_is_tied():
    text = "(float[B, 640] x) => (float[B, 640] y) { z = MatMul (x, table) y = MatMul (z, head) }"
    assert run(tied(text=text)).rewrites == 0


def test_no_other_pass_stores_the_head_again(tmp_path):
    context = PassContext(saved(tied(), tmp_path))
    for step in [*schedule(["fuse"]), *schedule(["canonicalize"])]:
        step()(context)
    assert [v.name for v in context.model.graph.initializers.values() if v.const_value.size >= 640] == ["table"]


@pytest.mark.parametrize("size", [256, 257])
def test_what_fold_constants_would_transpose_again_is_not_tied(size):
    model = tied(np.ones((size, 64), np.float32), text=TIED.replace("[B, S, 640]", ""))
    assert run(model).rewrites == (size == 257)
    context = PassContext(model)
    FoldConstants()(context)
    assert run(context.model).rewrites == 0


SQUARE = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)
TWICE = "(float[B, 64] x) => (float[B, 64] y) { z = MatMul (x, w) y = MatMul (z, v) }"


@pytest.mark.parametrize("value", [0.0, np.nan], ids=["numbers", "a NaN"])
def test_equal_weights_are_stored_once(place, value):
    weight = SQUARE.copy()
    weight[5, 7] = value
    model = place(read_graph(TWICE, {"w": weight, "v": weight.copy()}))
    assert run(model).rewrites == 1
    assert list(model.graph.initializers) == ["w"]
    assert [n.inputs[1].name for n in model.graph] == ["w", "w"]


@pytest.mark.parametrize("index", [(0, 0), (31, 5), (63, 63)])
def test_almost_equal_weights_stay(place, index):
    other = SQUARE.copy()
    other[index] += 0.5
    assert run(place(read_graph(TWICE, {"w": SQUARE, "v": other}))).rewrites == 0


def test_inputs_with_a_default_are_left_alone():
    text = "(float[64] x, float[64] w) => (float[64] y) { z = Add (x, w) y = Add (z, v) }"
    zeros = np.zeros(64, np.float32)
    assert run(read_graph(text, {"w": zeros, "v": zeros.copy()})).rewrites == 0


def test_bfloat16_bits_are_compared_not_numbers():
    table = np.zeros((640, 64), ml_dtypes.bfloat16)
    head = np.ascontiguousarray(table.T)
    head[3, 4] = -0.0
    model = tied(np.zeros((640, 64), np.float32))
    for name, array in (("table", table), ("head", head)):
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    assert run(model).rewrites == 0
