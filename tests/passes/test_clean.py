"""Passes that remove what nobody reads, what does nothing and what is computed twice."""

from qcompile.passes.clean import (
    EliminateCommonSubexpressions,
    EliminateDeadCode,
    EliminateIdentities,
    LiftConstants,
)
from tests.passes.norms import SHAPE, SIGNATURE
from tests.passes.six_tests import EXACT, Example, NearMiss, SixTests

TWO = SIGNATURE.replace("y)", f"y, {SHAPE} z)")


class TestEliminateDeadCode(SixTests):
    pass_class = EliminateDeadCode
    limits = EXACT
    examples = (
        Example(
            "a chain nobody reads", f"{SIGNATURE} {{ a = Neg(x) b = Abs(a) y = Exp(x) }}", {"y": "Exp(x)"}, rewrites=2
        ),
        Example("a weight nobody reads", f"{SIGNATURE} {{ y = Exp(x) }}", {"y": "Exp(x)"}, {"w": (4, 4)}),
        Example(
            "a weight that only dead code reads",
            f"{SIGNATURE} {{ a = Mul(x, w) y = Exp(x) }}",
            {"y": "Exp(x)"},
            {"w": (8,)},
            rewrites=2,
        ),
    )
    near_misses = (
        NearMiss("everything is read", f"{SIGNATURE} {{ a = Neg(x) y = Mul(a, w) }}", None, {"w": (8,)}),
        NearMiss("an input nobody reads stays", f"({SHAPE} x, {SHAPE} unused) => ({SHAPE} y) {{ y = Neg(x) }}", None),
        NearMiss(
            "one of two outputs is read",
            f"{SIGNATURE} {{ a, b = Split<axis = 2, num_outputs = 2>(x) y = Concat<axis = 2>(a, a) }}",
            None,
        ),
        NearMiss(
            "a weight that is an output", f"({SHAPE} x) => ({SHAPE} y, float[8] w) {{ y = Neg(x) }}", None, {"w": (8,)}
        ),
    )
    counts = (("qwen2-builder", 1), ("qwen2-optimum", 168))


class TestEliminateIdentities(SixTests):
    pass_class = EliminateIdentities
    limits = EXACT
    examples = (
        Example("between two nodes", f"{SIGNATURE} {{ a = Neg(x) b = Identity(a) y = Exp(b) }}", {"y": "Exp(Neg(x))"}),
        Example(
            "a chain", f"{SIGNATURE} {{ a = Identity(x) b = Identity(a) y = Exp(b) }}", {"y": "Exp(x)"}, rewrites=2
        ),
        Example("before an output", f"{SIGNATURE} {{ a = Neg(x) y = Identity(a) }}", {"y": "Neg(x)"}),
        Example("of a weight", f"{SIGNATURE} {{ a = Identity(w) y = Mul(x, a) }}", {"y": "Mul(x, w)"}, {"w": (8,)}),
        Example(
            "one value, two outputs",
            f"{TWO} {{ a = Neg(x) y = Identity(a) z = Exp(a) }}",
            {"y": "Neg(x)", "z": "Exp(Neg(x))"},
        ),
    )
    near_misses = (
        NearMiss("from an input to an output", f"{SIGNATURE} {{ y = Identity(x) }}", None),
        NearMiss("a value that is an output twice", f"{TWO} {{ y = Neg(x) z = Identity(y) }}", None),
    )
    counts = (("qwen2-builder", 6), ("qwen2-optimum", 30))


class TestEliminateCommonSubexpressions(SixTests):
    pass_class = EliminateCommonSubexpressions
    limits = EXACT
    examples = (
        Example(
            "two equal nodes", f"{SIGNATURE} {{ a = Exp(x) b = Exp(x) y = Mul(a, b) }}", {"y": "Mul(Exp(x), Exp(x))"}
        ),
        Example(
            "two equal chains",
            f"{SIGNATURE} {{ a = Exp(x) b = Neg(a) c = Exp(x) d = Neg(c) y = Mul(b, d) }}",
            {"y": "Mul(Neg(Exp(x)), Neg(Exp(x)))"},
            rewrites=2,
        ),
        Example(
            "equal attributes",
            f"{SIGNATURE} {{ a = Softmax<axis = 1>(x) b = Softmax<axis = 1>(x) y = Mul(a, b) }}",
            None,
        ),
    )
    near_misses = (
        NearMiss(
            "other attributes",
            f"{SIGNATURE} {{ a = Softmax<axis = 1>(x) b = Softmax<axis = 2>(x) y = Mul(a, b) }}",
            None,
        ),
        NearMiss("other inputs", f"{SIGNATURE} {{ a = Exp(x) b = Exp(a) y = Mul(a, b) }}", None),
        NearMiss(
            "operands in another order", f"{SIGNATURE} {{ n = Neg(x) a = Sub(x, n) b = Sub(n, x) y = Mul(a, b) }}", None
        ),
        NearMiss(
            "random numbers", f"{SIGNATURE} {{ a = RandomNormalLike(x) b = RandomNormalLike(x) y = Sub(a, b) }}", None
        ),
        NearMiss(
            "random numbers of a shape",
            f"{SIGNATURE} {{ a = RandomUniform<shape = [8]>() b = RandomUniform<shape = [8]>()"
            " c = Sub(a, b) y = Mul(x, c) }",
            None,
        ),
        NearMiss("coin flips", f"{SIGNATURE} {{ a = Bernoulli(x) b = Bernoulli(x) y = Sub(a, b) }}", "draws anew"),
    )
    counts = (("qwen2-builder", 0), ("qwen2-optimum", 79))


class TestLiftConstants(SixTests):
    pass_class = LiftConstants
    limits = EXACT
    examples = (
        Example(
            "a float",
            f"{SIGNATURE} {{ c = Constant<value_float = 2.0>() y = Mul(x, c) }}",
            {"y": "Mul(x, 2)"},
            dtypes=("float",),
        ),
        Example(
            "integers",
            f"{SIGNATURE} {{ c = Constant<value_ints = [0, 0, -1]>() y = Reshape(x, c) }}",
            {"y": "Reshape(x, [0, 0, -1])"},
        ),
        Example(
            "a tensor, read twice",
            f"{SIGNATURE} {{ c = Constant<value = float[1] {{3}}>() m = Mul(x, c) y = Add(m, c) }}",
            {"y": "Add(Mul(x, [3]), [3])"},
            dtypes=("float",),
        ),
    )
    near_misses = (NearMiss("an initializer already", f"{SIGNATURE} <float c = {{2}}> {{ y = Mul(x, c) }}", None),)
    counts = (("qwen2-builder", 0), ("qwen2-optimum", 221))


def test_an_identity_of_an_output_keeps_both_names():
    context = TestEliminateIdentities.prepared(f"{TWO} {{ y = Neg(x) z = Identity(y) }}", {}, "float", 18)
    EliminateIdentities()(context)
    assert [v.name for v in context.model.graph.outputs] == ["y", "z"]
