import numpy as np

from qcompile.passes.canonicalize_projections import CanonicalizeProjections
from tests.passes.norms import SHAPE
from tests.passes.six_tests import Example, NearMiss, SixTests

OUT = "float[batch_size, sequence_length, 6]"
ROW, ROW_OUT = "float[batch_size, 8] x", "float[batch_size, 6] y"
CONSTANTS = """<int64[2] rows = {-1, 8}, int64[3] shape = {0, 0, 6}, int64[1] n = {6}, int64[2] turned = {6, -1}>"""
W, WT, B = {"w": (8, 6)}, {"w": (6, 8)}, {"b": (6,)}
ROWS_BACK = "d = Shape<start = 0, end = 2>(x) s = Concat<axis = 0>(d, n) y = Reshape(p, s)"


def row(nodes, inputs="", outputs=""):
    return f"({ROW}{inputs}) => ({ROW_OUT}{outputs}) {CONSTANTS} {{ {nodes} }}"


def graph(nodes, inputs="", outputs=""):
    return f"({SHAPE} x{inputs}) => ({OUT} y{outputs}) {CONSTANTS} {{ {nodes} }}"


class TestCanonicalizeProjections(SixTests):
    pass_class = CanonicalizeProjections
    examples = (
        Example("Gemm", row("y = Gemm(x, w, b)"), {"y": "Add(MatMul(x, w), b)"}, {**W, **B}),
        Example("Gemm without bias", row("y = Gemm(x, w)"), {"y": "MatMul(x, w)"}, W),
        Example(
            "Gemm, transposed",
            row("y = Gemm<transB = 1>(x, w, b)"),
            {"y": "Add(MatMul(x, w.transposed), b)"},
            {**WT, **B},
        ),
        Example(
            "Gemm, factors said to be 1",
            row("y = Gemm<alpha = 1.0, beta = 1.0>(x, w, b)"),
            {"y": "Add(MatMul(x, w), b)"},
            {**W, **B},
        ),
        Example(
            "transposed weight",
            graph("t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t)"),
            {"y": "MatMul(x, w.transposed)"},
            WT,
        ),
        Example(
            "rows of a product", graph(f"r = Reshape(x, rows) p = MatMul(r, w) {ROWS_BACK}"), {"y": "MatMul(x, w)"}, W
        ),
        Example(
            "rows of a projection",
            graph(f"r = Reshape(x, rows) m = MatMul(r, w) p = Add(b, m) {ROWS_BACK}"),
            {"y": "Add(MatMul(x, w), b)"},
            {**W, **B},
        ),
        Example(
            "rows of a Gemm",
            graph(f"r = Reshape(x, rows) p = Gemm(r, w, b) {ROWS_BACK}"),
            {"y": "Add(MatMul(x, w), b)"},
            {**W, **B},
            rewrites=2,
        ),
    )
    near_misses = (
        NearMiss("alpha", row("y = Gemm<alpha = 0.5>(x, w, b)"), None, {**W, **B}),
        NearMiss("beta", row("y = Gemm<beta = 0.5>(x, w, b)"), None, {**W, **B}),
        NearMiss(
            "the activation is transposed",
            "(float[8, batch_size] x) => (float[batch_size, 6] y) { y = Gemm<transA = 1>(x, w, b) }",
            None,
            {**W, **B},
        ),
        NearMiss("the weight is an input", row("y = Gemm(x, v, b)", ", float[8, 6] v"), None, B),
        NearMiss("a bias of rows", row("y = Gemm(x, w, b)").replace("batch_size", "3"), None, {**W, "b": (3, 6)}),
        NearMiss("a scalar bias", row("y = Gemm(x, w, b)"), None, {**W, "b": ()}),
        NearMiss(
            "a tied weight",
            graph(
                "t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t) e = Gather(w, ids)",
                ", int64[batch_size] ids",
                ", float[batch_size, 8] e",
            ),
            None,
            WT,
        ),
        NearMiss(
            "the transposed weight is used elsewhere",
            graph("t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t) z = Neg(t)", "", ", float[8, 6] z"),
            None,
            WT,
        ),
        NearMiss(
            "transposed another way",
            "(float[5, sequence_length, 8] x) => (float[5, sequence_length, 6] y)"
            " { t = Transpose<perm = [0, 2, 1]>(w) y = MatMul(x, t) }",
            None,
            {"w": (5, 6, 8)},
        ),
        NearMiss(
            "rows arranged anew",
            "(float[batch_size, 3, 8] x) => (float[6, any] y)"
            f" {CONSTANTS} {{ r = Reshape(x, rows) p = MatMul(r, w) y = Reshape(p, turned) }}",
            None,
            W,
        ),
        NearMiss(
            "the rows are read elsewhere",
            graph(f"r = Reshape(x, rows) p = MatMul(r, w) {ROWS_BACK} z = Neg(p)", "", ", float[any, 6] z"),
            None,
            W,
        ),
    )
    counts = (("qwen2-builder", 0), ("qwen2-optimum", 0))


def test_a_large_weight_is_transposed_while_it_is_saved():
    large = np.arange(600 * 400, dtype=np.float32).reshape(600, 400)
    text = "(float[batch_size, 400] x) => (float[batch_size, 600] y) { y = Gemm<transB = 1>(x, w) }"
    context = TestCanonicalizeProjections.prepared(text, {"w": large}, "float", 18)
    CanonicalizeProjections()(context)
    np.testing.assert_array_equal(context.model.graph.initializers["w.transposed"].const_value.numpy(), large.T)
