from qcompile.passes.fuse_linear import FuseLinear
from tests.passes.norms import SHAPE
from tests.passes.six_tests import TIDY, Example, NearMiss, SixTests

OUT = "float[batch_size, sequence_length, 6]"
SIGNATURE = f"({SHAPE} x) => ({OUT} y)"
WEIGHTS = {"w": (8, 6), "b": (6,)}
FUSED = {"y": "qcompile::Linear(x, w, b)"}
TRANSPOSED = {"y": "qcompile::Linear(x, t.folded, b)"}
ROWS = "<int64[2] rows = {-1, 8}, int64[3] shape = {3, -1, 6}>"


class TestFuseLinear(SixTests):
    pass_class = FuseLinear
    prepare = TIDY
    examples = (
        Example("bias last", f"{SIGNATURE} {{ p = MatMul(x, w) y = Add(p, b) }}", FUSED, WEIGHTS),
        Example("bias first", f"{SIGNATURE} {{ p = MatMul(x, w) y = Add(b, p) }}", FUSED, WEIGHTS),
        Example(
            "transposed weight",
            f"{SIGNATURE} {{ t = Transpose<perm = [1, 0]>(w) p = MatMul(x, t) y = Add(b, p) }}",
            TRANSPOSED,
            {"w": (6, 8), "b": (6,)},
        ),
        Example("Gemm", "(float[batch_size, 8] x) => (float[batch_size, 6] y) { y = Gemm(x, w, b) }", FUSED, WEIGHTS),
        Example(
            "Gemm, transposed weight",
            "(float[batch_size, 8] x) => (float[batch_size, 6] y) { y = Gemm<transB = 1>(x, w, b) }",
            {"y": "qcompile::Linear(x, w.transposed, b)"},
            {"w": (6, 8), "b": (6,)},
        ),
        Example(
            "Gemm on flattened rows",
            f"{SIGNATURE} <int64[2] rows = {{-1, 8}}, int64[1] out = {{6}}> {{ r = Reshape(x, rows) p = Gemm(r, w, b)"
            " d = Shape<start = 0, end = 2>(x) s = Concat<axis = 0>(d, out) y = Reshape(p, s) }",
            FUSED,
            WEIGHTS,
        ),
        Example(
            "two projections share a bias",
            f"({SHAPE} x) => ({OUT} y, {OUT} z) {{ p = MatMul(x, w) y = Add(p, b) q = MatMul(x, v) z = Add(b, q) }}",
            {**FUSED, "z": "qcompile::Linear(x, v, b)"},
            {**WEIGHTS, "v": (8, 6)},
            rewrites=2,
        ),
    )
    near_misses = (
        NearMiss(
            "a residual, not a bias",
            f"({SHAPE} x, {OUT} r) => ({OUT} y) {{ p = MatMul(x, w) y = Add(p, r) }}",
            None,
            WEIGHTS,
        ),
        NearMiss(
            "the weight is computed",
            f"({SHAPE} x, float[8, 6] v) => ({OUT} y) {{ p = MatMul(x, v) y = Add(p, b) }}",
            None,
            WEIGHTS,
        ),
        NearMiss(
            "a scalar bias",
            f"{SIGNATURE} {{ p = MatMul(x, w) y = Add(p, b) }}",
            "'b' has rank 0",
            {"w": (8, 6), "b": ()},
        ),
        NearMiss(
            "a bias [1]",
            f"{SIGNATURE} {{ p = MatMul(x, w) y = Add(p, b) }}",
            "'b' axis 0 is 1",
            {"w": (8, 6), "b": (1,)},
        ),
        NearMiss(
            "a bias per token",
            "(float[batch_size, 3, 8] x) => (float[batch_size, 3, 6] y) { p = MatMul(x, w) y = Add(p, b) }",
            "'b' has rank 2",
            {"w": (8, 6), "b": (3, 6)},
        ),
        NearMiss(
            "a batch of weights",
            "(float[4, sequence_length, 8] x) => (float[4, sequence_length, 6] y) { p = MatMul(x, w) y = Add(p, b) }",
            "weight 'w' has shape [4, 8, 6]",
            {"w": (4, 8, 6), "b": (6,)},
        ),
        NearMiss("a vector", "(float[8] x) => (float[6] y) { p = MatMul(x, w) y = Add(p, b) }", "is a vector", WEIGHTS),
        NearMiss(
            "the product is an output",
            f"({SHAPE} x) => ({OUT} y, {OUT} p) {{ p = MatMul(x, w) y = Add(p, b) }}",
            "also an output of the graph",
            WEIGHTS,
        ),
        NearMiss(
            "the product is read elsewhere",
            f"({SHAPE} x) => ({OUT} y, {OUT} z) {{ p = MatMul(x, w) y = Add(p, b) z = Neg(p) }}",
            "also read by Neg",
            WEIGHTS,
        ),
    )
    counts = (
        ("qwen2-builder", 6),
        ("qwen2-dynamo-sdpa", 6),
        ("qwen2-optimum", 6),
        ("qwen3-builder", 0),
    )
