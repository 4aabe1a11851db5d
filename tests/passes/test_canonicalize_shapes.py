from qcompile.passes.canonicalize_shapes import CanonicalizeShapes
from tests.passes.norms import SHAPE
from tests.passes.six_tests import EXACT, Example, NearMiss, SixTests

CONSTANTS = """<int64[1] heads = {2}, int64[1] head = {4}, int64[4] split = {0, 0, 2, 4}, int64[3] same = {0, 0, 8},
    int64[3] flat = {0, 0, -1}, int64[2] rows = {-1, 8}, int64[3] ones = {1, 1, 8}, int64[1] two = {2},
    int64[3] wide = {1, 1, 1}, int64[3] three = {3, 1, 1}>"""
COMPUTED = "d = Shape<start = 0, end = 2>(x) s = Concat<axis = 0>(d, heads, head)"
HEADS = "float[batch_size, sequence_length, 2, 4]"
CACHE = "float[batch_size, 2, total_sequence_length, 4]"


def graph(nodes, out=HEADS, inputs="", outputs=""):
    return f"({SHAPE} x{inputs}) => ({out} y{outputs}) {CONSTANTS} {{ {nodes} }}"


class TestCanonicalizeShapes(SixTests):
    pass_class = CanonicalizeShapes
    limits = EXACT
    examples = (
        Example("computed target", graph(f"{COMPUTED} y = Reshape(x, s)"), {"y": "Reshape(x, [0, 0, 2, 4])"}),
        Example(
            "a constant target in another spelling",
            graph("y = Reshape(x, split)").replace("{0, 0, 2, 4}", "{0, 0, -1, 4}"),
            {"y": "Reshape(x, [0, 0, 2, 4])"},
        ),
        Example("rows", graph(f"{COMPUTED} r = Reshape(x, rows) y = Reshape(r, s)"), {"y": "Reshape(x, [0, 0, 2, 4])"}),
        Example(
            "there and back",
            graph("r = Reshape(x, split) b = Reshape(r, flat) y = Neg(b)", SHAPE),
            {"y": "Neg(Identity(x))"},
            rewrites=1,
        ),
        Example(
            "Reshape to the same shape", graph("r = Reshape(x, same) y = Neg(r)", SHAPE), {"y": "Neg(Identity(x))"}
        ),
        Example("Cast to the same type", graph("c = Cast<to = $T>(x) y = Neg(c)", SHAPE), {"y": "Neg(Identity(x))"}),
        Example("Expand to the same shape", graph("e = Expand(x, wide) y = Neg(e)", SHAPE), {"y": "Neg(Identity(x))"}),
        Example(
            "Slice of everything",
            graph("e = Slice(x, heads, head) y = Neg(e)", SHAPE)
            .replace("heads = {2}", "heads = {0}")
            .replace("head = {4}", "head = {9223372036854775807}"),
            None,
        ),
        Example(
            "two Transposes",
            graph(
                "a = Transpose<perm = [1, 0, 2]>(x) y = Transpose<perm = [0, 2, 1]>(a)",
                "float[sequence_length, 8, batch_size]",
            ),
            {"y": "Transpose(x, perm=[1, 2, 0])"},
        ),
        Example(
            "Transpose there and back",
            graph("a = Transpose<perm = [1, 0, 2]>(x) b = Transpose<perm = [1, 0, 2]>(a) y = Neg(b)", SHAPE),
            {"y": "Neg(Identity(x))"},
            rewrites=1,
        ),
        Example(
            "through float32",
            graph("a = Cast<to = 1>(x) b = Cast<to = $T>(a) y = Neg(b)", SHAPE),
            {"y": "Neg(Identity(x))"},
            dtypes=("float16", "bfloat16"),
        ),
        Example(
            "Expand before a product",
            graph("o = Neg(x) e = Expand(row, ones) y = Mul(e, x)", SHAPE, inputs=", float[8] row"),
            {"y": "Mul(row, x)"},
        ),
        Example(
            "torch's swap of the last axes",
            f"({CACHE} k) => (float[batch_size, 2, 4, total_sequence_length] y) "
            "<int64[1] four = {4}, int64[1] rest = {-1}> { b = Shape<start = 0, end = 2>(k) l = Shape<start = 2, end = 3>(k)"
            " r0 = Concat<axis = 0>(rest, l, four) r = Reshape(k, r0) t = Transpose<perm = [0, 2, 1]>(r)"
            " s = Concat<axis = 0>(b, four, l) y = Reshape(t, s) }",
            {"y": "Transpose(k, perm=[0, 1, 3, 2])"},
        ),
        Example(
            "the inner Reshape is read elsewhere",
            graph(
                "r = Reshape(x, split) z = Neg(r) b = Reshape(r, rows) y = Neg(b)",
                "float[any, 8]",
                outputs=f", {HEADS} z",
            ),
            {"y": "Neg(Reshape(x, [-1, 8]))", "z": "Neg(Reshape(x, [0, 0, 2, 4]))"},
        ),
    )
    near_misses = (
        NearMiss("canonical already", graph("y = Reshape(x, split)"), None),
        NearMiss(
            "Cast to fewer bits and back", graph("a = Cast<to = 10>(x) b = Cast<to = 1>(a) y = Neg(b)", SHAPE), None
        ),
        NearMiss("Cast to integers and back", graph("a = Cast<to = 7>(x) b = Cast<to = 1>(a) y = Neg(b)", SHAPE), None),
        NearMiss(
            "through bfloat16",
            graph("a = Cast<to = 16>(x) b = Cast<to = 10>(a) y = Neg(b)", SHAPE),
            None,
            dtype="float16",
        ),
        NearMiss(
            "a Transpose of equal sizes",
            "(float[3, 3] x) => (float[3, 3] y) { t = Transpose<perm = [1, 0]>(x) y = Neg(t) }",
            None,
        ),
        NearMiss(
            "an Expand that widens",
            graph("e = Expand(x, three) y = Neg(e)", "float[any, sequence_length, 8]").replace("batch_size", "1"),
            None,
        ),
        NearMiss(
            "an Expand that decides the shape",
            graph("e = Expand(row, three) y = Mul(e, row)", "float[3, 1, 8]", inputs=", float[8] row"),
            None,
        ),
        NearMiss("an output of its own", graph("y = Identity(x)", SHAPE), None),
        NearMiss(
            "a Slice that is all in one case only",
            graph("y0 = Slice(x, zero, seven, one) y = Neg(y0)", "float[batch_size, any, 8]").replace(
                "int64[1] two = {2}", "int64[1] zero = {0}, int64[1] seven = {7}, int64[1] one = {1}"
            ),
            None,
        ),
    )
    counts = (("qwen2-builder", 6), ("qwen2-dynamo-sdpa", 21), ("qwen2-optimum", 43))
