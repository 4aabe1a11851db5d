import numpy as np

from qcompile.passes.canonicalize_arithmetic import CanonicalizeArithmetic
from tests.passes.norms import SHAPE, SIGNATURE
from tests.passes.six_tests import Example, NearMiss, SixTests

CONSTANTS = """<float zero = {0}, float one = {1}, float two = {2}, float three = {3}, float half = {0.5},
    float minus_half = {-0.5}, float four = {4}, float[1, 1, 1] wide_one = {1}, float[1, 1, 1, 1] wider_one = {1}>"""


def graph(nodes, signature=SIGNATURE):
    return f"{signature} {CONSTANTS} {{ {nodes} }}"


def example(name, nodes, y, rewrites=1, **options):
    return Example(name, graph(nodes), {"y": y}, rewrites=rewrites, **options)


class TestCanonicalizeArithmetic(SixTests):
    pass_class = CanonicalizeArithmetic
    examples = (
        example("square", "y = Pow(x, two)", "Mul(x, x)"),
        example("cube", "y = Pow(x, three)", "Mul(Mul(x, x), x)"),
        example("inverse root", "a = Exp(x) y = Pow(a, minus_half)", "Reciprocal(Sqrt(Exp(x)))"),
        example("one over x", "a = Exp(x) y = Div(one, a)", "Reciprocal(Exp(x))"),
        example("one [1, 1, 1] over x", "a = Exp(x) y = Div(wide_one, a)", "Reciprocal(Exp(x))"),
        example("x over a constant", "y = Div(x, four)", "Mul(x, 0.25)"),
        example("x over a root", "a = Exp(x) r = Sqrt(a) y = Div(x, r)", "Mul(x, Reciprocal(Sqrt(Exp(x))))"),
        example("logistic", "n = Neg(x) e = Exp(n) a = Add(e, one) y = Div(one, a)", "Sigmoid(x)", 2),
        example("silu by logistic", "n = Neg(x) e = Exp(n) a = Add(e, one) y = Div(x, a)", "Mul(x, Sigmoid(x))"),
        example("Swish", "y = Swish(x)", "Mul(x, Sigmoid(x))", opset=24, dtypes=("bfloat16",)),
        Example(
            "the root is read elsewhere too",
            graph("a = Exp(x) r = Sqrt(a) y = Div(x, r) z = Neg(r)", SIGNATURE.replace("y)", f"y, {SHAPE} z)")),
            {"y": "Div(x, Sqrt(Exp(x)))", "z": "Neg(Sqrt(Exp(x)))"},
            rewrites=0,
        ),
    )
    near_misses = (
        NearMiss("another power", graph("a = Exp(x) y = Pow(a, half)"), None),
        NearMiss("nearly a square", graph("y = Pow(x, exponent)"), None, {"exponent": np.array(2.0001, np.float32)}),
        NearMiss("powers per channel", graph("a = Exp(x) y = Pow(a, many)"), None, {"many": np.full(8, 2, np.float32)}),
        NearMiss("the exponent is computed", graph("a = Exp(x) y = Pow(a, x)"), None),
        NearMiss("division by zero", graph("y = Div(x, zero)"), None),
        NearMiss("division by a vector", graph("y = Div(x, many)"), None, {"many": np.full(8, 2, np.float32)}),
        NearMiss("two over x", graph("a = Exp(x) y = Div(two, a)"), None),
        NearMiss(
            "a dividend that adds dimensions",
            graph(
                "a = Exp(x) y = Div(wider_one, a)",
                SIGNATURE.replace(
                    "(float[batch_size, sequence_length, 8] y", "(float[1, batch_size, sequence_length, 8] y"
                ),
            ),
            None,
        ),
        NearMiss("two added to the exponential", graph("n = Neg(x) e = Exp(n) a = Add(e, two) y = Div(x, a)"), None),
        NearMiss(
            "integers", "(int64[batch_size] x) => (int64[batch_size] y) <int64 two = {2}> { y = Div(x, two) }", None
        ),
        NearMiss("Swish with another alpha", graph("y = Swish<alpha = 1.702>(x)"), None, opset=24),
    )
    counts = (("qwen2-builder", 5), ("qwen2-dynamo-sdpa", 5), ("qwen2-optimum", 10))
