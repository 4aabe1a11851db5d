import numpy as np

from qcompile.passes.fuse_rms_norm import FuseRmsNorm
from tests.passes.norms import NORMALS, SHAPE, SIGNATURE, rms_norm
from tests.passes.six_tests import TIDY, Example, NearMiss, SixTests

GAMMA = {"gamma": (8,)}
FUSED = {"y": "qcompile::RmsNorm(x, gamma, epsilon=7.6294e-06)"}
BY_DEFAULT = {"y": "qcompile::RmsNorm(x, gamma, epsilon=1e-05)"}
TO_FLOAT32 = f"""{SIGNATURE} <float f32_eps = {{7.62939453125e-06}}, float f32_two = {{2}}, int64[1] last = {{-1}}> {{
    w = Cast<to = 1>(x)
    square = Pow(w, f32_two)
    mean = ReduceMean<keepdims = 1>(square, last)
    variance = Add(mean, f32_eps)
    r = Sqrt(variance)
    n = Div(w, r)
    TAIL
}}"""
OPERATOR = f"{SIGNATURE} {{ y = RMSNormalization<ATTRIBUTES>(x, gamma) }}"


class TestFuseRmsNorm(SixTests):
    pass_class = FuseRmsNorm
    prepare = TIDY
    examples = (
        *(Example(name, rms_norm(normal=normal), FUSED, GAMMA) for name, normal in NORMALS.items()),
        Example("power 2", rms_norm(square="Pow(x, two)"), FUSED, GAMMA),
        Example("gamma first", rms_norm(scaled="Mul(gamma, n)"), FUSED, GAMMA),
        Example("epsilon first", rms_norm(variance="Add(eps, mean)"), FUSED, GAMMA),
        Example("epsilon [1]", rms_norm(variance="Add(mean, eps_1d)"), FUSED, GAMMA),
        Example("axis 2", rms_norm(mean="ReduceMean<keepdims = 1>(square, third)"), FUSED, GAMMA),
        Example("opset 17", rms_norm(mean="ReduceMean<keepdims = 1, axes = [-1]>(square)"), FUSED, GAMMA, opset=17),
        Example("opset 11", rms_norm(mean="ReduceMean<axes = [2]>(square)"), FUSED, GAMMA, opset=11, dtypes=("float",)),
        Example("through float32", TO_FLOAT32.replace("TAIL", "t = Cast<to = $T>(n) y = Mul(gamma, t)"), FUSED, GAMMA),
        Example(
            "gamma in float32",
            TO_FLOAT32.replace("TAIL", "s = Mul(n, f32_gamma) y = Cast<to = $T>(s)"),
            {"y": "Cast(qcompile::RmsNorm(Cast(x, to=1), f32_gamma, epsilon=7.6294e-06), to=10)"},
            {"f32_gamma": (8,)},
            dtypes=("float16",),
        ),
        Example("operator", OPERATOR.replace("ATTRIBUTES", "epsilon = 7.62939453125e-06"), FUSED, GAMMA, opset=23),
        Example(
            "operator, default epsilon, axis 2", OPERATOR.replace("ATTRIBUTES", "axis = 2"), BY_DEFAULT, GAMMA, opset=23
        ),
        Example(
            "two norms of one value",
            f"({SHAPE} x) => ({SHAPE} y, {SHAPE} z) <float eps = {{1e-6}}, int64[1] last = {{-1}}> {{"
            "a = Mul(x, x) b = ReduceMean(a, last) c = Add(b, eps) d = Sqrt(c) e = Div(x, d) y = Mul(e, gamma)"
            "f = Mul(x, x) g = ReduceMean(f, last) h = Add(g, eps) i = Sqrt(h) j = Div(x, i) z = Mul(j, other) }",
            None,
            {"gamma": (8,), "other": (8,)},
            rewrites=0,
        ),
        Example(
            "heads of Qwen3",
            rms_norm(
                signature="(float[batch_size, sequence_length, 3, 8] x) => (float[batch_size, sequence_length, 3, 8] y)"
            ),
            FUSED,
            GAMMA,
        ),
        Example(
            "epsilon 0.5 is kept",
            rms_norm().replace("eps = {7.62939453125e-06}", "eps = {0.5}"),
            {"y": "qcompile::RmsNorm(x, gamma, epsilon=0.5)"},
            GAMMA,
        ),
    )
    near_misses = (
        NearMiss(
            "other axis", rms_norm(mean="ReduceMean<keepdims = 1>(square, second)"), "expected [-1], got [1]", GAMMA
        ),
        NearMiss("sum, not mean", rms_norm(mean="ReduceSum<keepdims = 1>(square, last)"), None, GAMMA),
        NearMiss("no epsilon", rms_norm(variance="Identity(mean)"), None, GAMMA),
        NearMiss("epsilon is computed", rms_norm(variance="Add(mean, mean)"), "epsilon is not a constant", GAMMA),
        NearMiss(
            "epsilon per channel",
            rms_norm(variance="Add(mean, many)"),
            "epsilon has 8 elements",
            {**GAMMA, "many": np.full(8, 1e-5, np.float32)},
        ),
        NearMiss(
            "square of something else", rms_norm(square="Mul(x, x2)", before="x2 = Abs(x)"), "not the same x", GAMMA
        ),
        NearMiss("gamma per token", rms_norm(scaled="Mul(n, x)"), "gamma is not a constant", GAMMA),
        NearMiss("gamma is a scalar", rms_norm(scaled="Mul(n, two)"), "gamma has shape []", GAMMA),
        NearMiss("gamma [1, 8]", rms_norm(), "gamma has shape [1, 8]", {"gamma": (1, 8)}),
        NearMiss(
            "an inner value is an output",
            rms_norm(signature=SIGNATURE.replace("y)", f"y, {SHAPE} n)")),
            "also an output of the graph",
            GAMMA,
        ),
        NearMiss(
            "an inner value is read elsewhere",
            rms_norm(
                signature=SIGNATURE.replace("y)", "y, float[batch_size, sequence_length, 1] z)"), after="z = Neg(mean)"
            ),
            "also read by Neg",
            GAMMA,
        ),
        NearMiss(
            "returns another type",
            TO_FLOAT32.replace("TAIL", "t = Cast<to = 16>(n) y = Mul(t, bgamma)").replace("=> (float", "=> (bfloat16"),
            None,
            {"bgamma": (8,)},
        ),
        NearMiss("operator on another axis", OPERATOR.replace("ATTRIBUTES", "axis = 1"), "axis is 1", GAMMA, opset=23),
        NearMiss("operator in half", OPERATOR.replace("ATTRIBUTES", "stash_type = 10"), "stash_type is 10", GAMMA, 23),
    )
    counts = (
        ("qwen2-builder", 5),
        ("qwen2-dynamo-sdpa", 5),
        ("qwen2-optimum", 5),
        ("qwen2-dynamo-opset23", 5),
        ("qwen3-builder", 9),
    )
