import numpy as np

from qcompile.passes.fold_constants import FoldConstants
from tests.passes.norms import SHAPE, SIGNATURE
from tests.passes.six_tests import Example, NearMiss, SixTests

CONSTANTS = """<float two = {2}, float three = {3}, int64[1] n = {2}, int64 i = {2},
    int64[1] large = {4000000}, int64[2] side = {300, 300}>"""
MASKED = f"({SHAPE} x, int64[batch_size, total_sequence_length] attention_mask) => ({SHAPE} y)"


def graph(nodes, signature=SIGNATURE):
    return f"{signature} {CONSTANTS} {{ {nodes} }}"


class TestFoldConstants(SixTests):
    pass_class = FoldConstants
    examples = (
        Example("arithmetic", graph("c = Mul(two, three) y = Mul(x, c)"), {"y": "Mul(x, 6)"}),
        Example(
            "a chain",
            graph("c = Mul(two, three) d = Sqrt(c) e = Neg(d) y = Mul(x, e)"),
            {"y": "Mul(x, -2.4495)"},
            rewrites=3,
            dtypes=("float",),
        ),
        Example(
            "a head size read off a shape",
            graph("s = Shape(x) h = Gather(s, i) f = Cast<to = $T>(h) y = Div(x, f)"),
            {"y": "Div(x, 8)"},
            rewrites=2,
        ),
        Example(
            "a transposed weight",
            graph("t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t)"),
            {"y": "MatMul(x, t.folded)"},
            {"w": (8, 8)},
        ),
        Example("CastLike of a constant", graph("c = CastLike(three, x) y = Mul(x, c)"), {"y": "Mul(x, 3)"}),
    )
    near_misses = (
        NearMiss(
            "a length differs from call to call",
            graph("s = Shape<start = 1, end = 2>(x) f = Cast<to = 1>(s) y = Div(x, f)"),
            None,
        ),
        NearMiss(
            "it hangs on the mask",
            graph("m = ReduceMax<keepdims = 0>(attention_mask) f = Cast<to = 1>(m) y = Mul(x, f)", MASKED),
            None,
        ),
        NearMiss(
            "it would grow the file",
            graph("z = ConstantOfShape(large) s = ReduceSum(z) y = Add(x, s)"),
            None,
            dtype="float16",
        ),
        NearMiss(
            "a large weight stays as it is stored",
            graph(
                "t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t)",
                f"({SHAPE.replace('8]', '300]')} x) => ({SHAPE.replace('8]', '300]')} y)",
            ),
            None,
            {"w": np.ones((300, 300), np.float32)},
        ),
        NearMiss("random numbers", graph("r = RandomNormalLike(w) y = Add(x, r)"), None, {"w": (8,)}),
        NearMiss(
            "a branch on the length",
            graph(
                "s = Shape<start = 1, end = 2>(attention_mask) g = Greater(s, far) f = Cast<to = 1>(g) y = Mul(x, f)",
                MASKED,
            ).replace("int64 i =", "int64[1] far = {1000000}, int64 i ="),
            None,
        ),
        NearMiss("a folded output", "(float[8] x) => (float y) <float two = {2}> { y = Neg(two) }", None),
    )
    counts = (("qwen2-builder", 1), ("qwen2-optimum", 71))
