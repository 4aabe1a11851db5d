from qcompile.passes.canonicalize_operands import CanonicalizeOperands
from tests.passes.norms import SHAPE, SIGNATURE
from tests.passes.six_tests import EXACT, Example, NearMiss, SixTests

CONSTANTS = "<float c = {3}, float one = {1}, int64[1] third = {2}, int64[1] second = {1}>"


def graph(nodes, signature=SIGNATURE):
    return f"{signature} {CONSTANTS} {{ {nodes} }}"


def example(name, nodes, y, rewrites=1, **options):
    return Example(name, graph(nodes), {"y": y}, rewrites=rewrites, **options)


class TestCanonicalizeOperands(SixTests):
    pass_class = CanonicalizeOperands
    limits = EXACT
    examples = (
        example("constant last in a product", "y = Mul(c, x)", "Mul(x, 3)"),
        example("constant last in a sum", "y = Add(c, x)", "Add(x, 3)"),
        example("constant last in a maximum", "y = Max(c, x)", "Max(x, 3)"),
        example("sigmoid last", "s = Sigmoid(x) y = Mul(s, x)", "Mul(x, Sigmoid(x))"),
        example("reciprocal last", "r = Reciprocal(x) y = Mul(r, x)", "Mul(x, Reciprocal(x))"),
        example(
            "silu before up", "u = Neg(x) s = Sigmoid(x) g = Mul(x, s) y = Mul(u, g)", "Mul(Mul(x, Sigmoid(x)), Neg(x))"
        ),
        example("curve last", "e = Erf(x) f = Add(one, e) y = Mul(f, x)", "Mul(x, Add(Erf(x), 1))", 2),
        example("softmax over the last axis", "y = Softmax<axis = 2>(x)", "Softmax(x, axis=-1)"),
        example("softmax without an axis", "y = Softmax(x)", "Softmax(x, axis=-1)"),
        example("mean over the last axis", "m = ReduceMean(x, third) y = Sub(x, m)", "Sub(x, ReduceMean(x, [-1]))"),
        Example(
            "control values after activations",
            f"({SHAPE} x, int64[batch_size, sequence_length] position_ids) => ({SHAPE} y) {CONSTANTS}"
            " { p = Cast<to = $T>(position_ids) q = Unsqueeze(p, third) y = Mul(q, x) }",
            {"y": "Mul(x, Unsqueeze(Cast(position_ids, to=1), [2]))"},
            dtypes=("float",),
        ),
    )
    near_misses = (
        NearMiss("in order already", graph("y = Mul(x, c)"), None),
        NearMiss("a difference does not commute", graph("y = Sub(c, x)"), None),
        NearMiss("a quotient does not commute", graph("y = Div(c, x)"), None),
        NearMiss("a power does not commute", graph("y = Pow(c, x)"), None),
        NearMiss("two activations", graph("n = Neg(x) y = Add(n, x)"), None),
        NearMiss("another axis", graph("y = Softmax<axis = 1>(x)"), None),
        NearMiss("mean over another axis", graph("m = ReduceMean(x, second) y = Sub(x, m)"), None),
        NearMiss("softmax of opset 12 over several axes", graph("y = Softmax<axis = 1>(x)"), None, opset=12),
        NearMiss("softmax of opset 12 over its last axis", graph("y = Softmax<axis = 2>(x)"), None, opset=12),
    )
    counts = (("qwen2-dynamo-sdpa", 10), ("qwen2-optimum", 26))
