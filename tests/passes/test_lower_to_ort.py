from qcompile.passes.lower_to_ort import LowerToOrt
from tests.passes.norms import ADDED, SHAPE, SIGNATURE
from tests.passes.six_tests import Example, NearMiss, SixTests

TWO = f"({SHAPE} a, {SHAPE} b) => ({SHAPE} y)"
WEIGHTS = {"gamma": (8,), "beta": (8,), "w": (8, 8)}
ONE_OUTPUT = f"({SHAPE} x, {SHAPE} residual) => ({SHAPE} y)"
SKIP_RMS = "com.microsoft::SkipSimplifiedLayerNormalization(x, residual, gamma, epsilon=0.125)"
SKIP = "com.microsoft::SkipLayerNormalization(x, residual, gamma, beta, epsilon=0.125)"


def example(name, signature, nodes, after, **options):
    return Example(
        name, f"{signature} {{ {nodes} }}", after if isinstance(after, dict) else {"y": after}, WEIGHTS, **options
    )


class TestLowerToOrt(SixTests):
    pass_class = LowerToOrt
    examples = (
        example(
            "RmsNorm",
            SIGNATURE,
            "y = qcompile.RmsNorm<epsilon = 0.125>(x, gamma)",
            "SimplifiedLayerNormalization(x, gamma, axis=-1, epsilon=0.125, stash_type=1)",
        ),
        example(
            "AddRmsNorm",
            ADDED,
            "y, h = qcompile.AddRmsNorm<epsilon = 0.125>(x, residual, gamma)",
            {"y": f"{SKIP_RMS}.0", "h": f"{SKIP_RMS}.3"},
        ),
        example(
            "AddRmsNorm without the sum",
            ONE_OUTPUT,
            "y, h = qcompile.AddRmsNorm<epsilon = 0.125>(x, residual, gamma)",
            f"{SKIP_RMS}.0",
        ),
        example(
            "LayerNorm",
            SIGNATURE,
            "y = qcompile.LayerNorm<epsilon = 0.125>(x, gamma, beta)",
            "LayerNormalization(x, gamma, beta, axis=-1, epsilon=0.125)",
        ),
        example(
            "AddLayerNorm",
            ADDED,
            "y, h = qcompile.AddLayerNorm<epsilon = 0.125>(x, residual, gamma, beta)",
            {"y": f"{SKIP}.0", "h": f"{SKIP}.3"},
        ),
        example("Linear", SIGNATURE, "y = qcompile.Linear(x, w, beta)", "Add(MatMul(x, w), beta)"),
        example("SwiGlu", TWO, "y = qcompile.SwiGlu(a, b)", "Mul(com.microsoft::QuickGelu(a, alpha=1), b)"),
        example("Gelu", SIGNATURE, "y = qcompile.Gelu(x)", "com.microsoft::Gelu(x)"),
        example("GeluTanh", SIGNATURE, "y = qcompile.GeluTanh(x)", "com.microsoft::FastGelu(x)"),
        Example(
            "a chain",
            f"{SIGNATURE} {{ a = qcompile.Gelu(x) b = qcompile.RmsNorm<epsilon = 0.125>(a, gamma)"
            " y = qcompile.Linear(b, w, beta) }",
            None,
            WEIGHTS,
            rewrites=3,
        ),
    )
    near_misses = (
        NearMiss("no fused operators", f"{SIGNATURE} {{ y = Gelu(x) }}", None, opset=20),
        NearMiss(
            "a rotary embedding has no kernel of its own",
            "(float[batch_size, 2, sequence_length, 8] x, float[batch_size, 1, sequence_length, 8] c) =>"
            " (float[batch_size, 2, sequence_length, 8] y) { y = qcompile.RotaryEmbedding(x, c, c) }",
            None,
        ),
    )
    counts = (("qwen2-builder", 7), ("qwen3-builder", 11), ("layernorm-gelu-legacy14", 9))
