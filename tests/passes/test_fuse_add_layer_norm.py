from qcompile.passes.fuse_add_layer_norm import FuseAddLayerNorm
from qcompile.passes.fuse_layer_norm import FuseLayerNorm
from tests.passes.norms import ADDED, SHAPE, SIGNATURE
from tests.passes.six_tests import TIDY, Example, NearMiss, SixTests

WEIGHTS = {"gamma": (8,), "beta": (8,)}
CALL = "qcompile::AddLayerNorm(x, residual, gamma, beta, epsilon=0.125)"
NORM = "y = qcompile.LayerNorm<epsilon = 0.125>(h, gamma, beta)"
ONE_OUTPUT = f"({SHAPE} x, {SHAPE} residual) => ({SHAPE} y)"


class TestFuseAddLayerNorm(SixTests):
    pass_class = FuseAddLayerNorm
    prepare = (*TIDY, FuseLayerNorm)
    examples = (
        Example(
            "the sum is an output",
            f"{ADDED} {{ h = Add(x, residual) {NORM} }}",
            {"y": f"{CALL}.0", "h": f"{CALL}.1"},
            WEIGHTS,
        ),
        Example("the sum is not read", f"{ONE_OUTPUT} {{ h = Add(x, residual) {NORM} }}", {"y": f"{CALL}.0"}, WEIGHTS),
        Example(
            "the sum is read elsewhere",
            f"{ADDED} {{ s = Add(x, residual) {NORM.replace('(h', '(s')} h = Add(s, y) }}",
            {"y": f"{CALL}.0", "h": f"Add({CALL}.1, {CALL}.0)"},
            WEIGHTS,
        ),
        Example(
            "from the standard operator",
            f"{ONE_OUTPUT} {{ h = Add(x, residual) y = LayerNormalization<epsilon = 0.125>(h, gamma, beta) }}",
            {"y": f"{CALL}.0"},
            WEIGHTS,
        ),
    )
    near_misses = (
        NearMiss(
            "the residual is broadcast",
            f"({SHAPE} x, float[1, sequence_length, 8] residual) => ({SHAPE} y) {{ h = Add(x, residual) {NORM} }}",
            "one is broadcast",
            WEIGHTS,
        ),
        NearMiss("no sum", f"{SIGNATURE} {{ h = Neg(x) {NORM} }}", None, WEIGHTS),
    )
    counts = (
        ("qwen2-builder", 0),
        ("layernorm-gelu-dynamo18", 3),
        ("layernorm-gelu-legacy18", 3),
    )
