import numpy as np

from qcompile.passes.fuse_layer_norm import FuseLayerNorm
from tests.passes.norms import NORMALS, SHAPE, SIGNATURE, layer_norm
from tests.passes.six_tests import TIDY, Example, NearMiss, SixTests

WEIGHTS = {"gamma": (8,), "beta": (8,)}
FUSED = {"y": "qcompile::LayerNorm(x, gamma, beta, epsilon=7.6294e-06)"}
OPERATOR = f"{SIGNATURE} {{ y = LayerNormalization<ATTRIBUTES>(x, gamma, beta) }}"


class TestFuseLayerNorm(SixTests):
    pass_class = FuseLayerNorm
    prepare = TIDY
    examples = (
        *(Example(name, layer_norm(normal=normal), FUSED, WEIGHTS) for name, normal in NORMALS.items()),
        Example("power 2", layer_norm(square="Pow(c, two)"), FUSED, WEIGHTS),
        Example("gamma and beta first", layer_norm(scaled="Mul(gamma, n)", shifted="Add(beta, s)"), FUSED, WEIGHTS),
        Example("epsilon first", layer_norm(variance="Add(eps_1d, spread)"), FUSED, WEIGHTS),
        Example(
            "opset 17 operator", OPERATOR.replace("ATTRIBUTES", "epsilon = 7.62939453125e-06"), FUSED, WEIGHTS, opset=17
        ),
        Example(
            "operator, default epsilon, axis 2",
            OPERATOR.replace("ATTRIBUTES", "axis = 2"),
            {"y": "qcompile::LayerNorm(x, gamma, beta, epsilon=1e-05)"},
            WEIGHTS,
        ),
        Example(
            "opset 13 chain",
            layer_norm(mean="ReduceMean<axes = [2]>(x)", spread="ReduceMean<axes = [-1]>(square)"),
            FUSED,
            WEIGHTS,
            opset=13,
        ),
    )
    near_misses = (
        NearMiss("mean over another axis", layer_norm(mean="ReduceMean(x, second)"), "expected [-1], got [1]", WEIGHTS),
        NearMiss(
            "centred on something else",
            layer_norm(before="x2 = Abs(x)", mean="ReduceMean(x2, last)"),
            "not the same x",
            WEIGHTS,
        ),
        NearMiss("beta is computed", layer_norm(shifted="Add(s, x)"), "beta is not a constant", WEIGHTS),
        NearMiss("gamma is a scalar", layer_norm(scaled="Mul(n, two)"), "gamma has shape []", WEIGHTS),
        NearMiss(
            "epsilon per channel",
            layer_norm(variance="Add(spread, many)"),
            "epsilon has 8 elements",
            {**WEIGHTS, "many": np.full(8, 1e-5, np.float32)},
        ),
        NearMiss(
            "the middle is an output",
            layer_norm(signature=SIGNATURE.replace("y)", f"y, {SHAPE} n)")),
            "also an output of the graph",
            WEIGHTS,
        ),
        NearMiss("operator on another axis", OPERATOR.replace("ATTRIBUTES", "axis = 1"), "axis is 1", WEIGHTS),
        NearMiss(
            "operator without beta", f"{SIGNATURE} {{ y = LayerNormalization(x, gamma) }}", "it has no beta", WEIGHTS
        ),
        NearMiss("operator in half", OPERATOR.replace("ATTRIBUTES", "stash_type = 16"), "stash_type is 16", WEIGHTS),
        NearMiss(
            "gamma is an input",
            f"({SHAPE} x, float[8] gamma) => ({SHAPE} y) {{ y = LayerNormalization(x, gamma, beta) }}",
            "gamma is not a constant",
            {"beta": (8,)},
        ),
    )
    counts = (
        ("qwen2-builder", 0),
        ("layernorm-gelu-dynamo18", 5),
        ("layernorm-gelu-legacy14", 5),
    )
