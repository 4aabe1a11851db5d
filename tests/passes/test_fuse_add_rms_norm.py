from qcompile.passes.fuse_add_rms_norm import FuseAddRmsNorm
from qcompile.passes.fuse_rms_norm import FuseRmsNorm
from tests.passes.norms import ADDED, SHAPE, SIGNATURE, rms_norm
from tests.passes.six_tests import TIDY, Example, NearMiss, SixTests

GAMMA = {"gamma": (8,)}
CALL = "qcompile::AddRmsNorm(x, residual, gamma, epsilon=0.125)"
NORM = "y = qcompile.RmsNorm<epsilon = 0.125>(h, gamma)"
ONE_OUTPUT = f"({SHAPE} x, {SHAPE} residual) => ({SHAPE} y)"


class TestFuseAddRmsNorm(SixTests):
    pass_class = FuseAddRmsNorm
    prepare = (*TIDY, FuseRmsNorm)
    examples = (
        Example(
            "the sum is an output",
            f"{ADDED} {{ h = Add(x, residual) {NORM} }}",
            {"y": f"{CALL}.0", "h": f"{CALL}.1"},
            GAMMA,
        ),
        Example("the sum is not read", f"{ONE_OUTPUT} {{ h = Add(x, residual) {NORM} }}", {"y": f"{CALL}.0"}, GAMMA),
        Example(
            "the sum is read by the next residual, before and after the norm",
            f"{ADDED.replace('h)', 'z, ' + SHAPE + ' w)')} {{ s = Add(x, residual) w = Neg(s)"
            f" {NORM.replace('(h', '(s')} z = Add(s, y) }}",
            {"y": f"{CALL}.0", "z": f"Add({CALL}.1, {CALL}.0)", "w": f"Neg({CALL}.1)"},
            GAMMA,
        ),
        Example(
            "from the primitive chain",
            rms_norm(
                signature=ADDED.replace("> y, ", "> y, ").replace(" x,", " a,"),
                before="x = Add(a, residual)",
                after="h = Neg(x)",
            ).replace("7.62939453125e-06", "0.125"),
            {"y": f"{CALL.replace('(x', '(a')}.0", "h": f"Neg({CALL.replace('(x', '(a')}.1)"},
            GAMMA,
        ),
    )
    near_misses = (
        NearMiss(
            "the residual is broadcast",
            f"({SHAPE} x, float[batch_size, 1, 8] residual) => ({SHAPE} y) {{ h = Add(x, residual) {NORM} }}",
            "one is broadcast",
            GAMMA,
        ),
        NearMiss(
            "a bias, not a residual",
            f"{SIGNATURE} {{ h = Add(x, bias) {NORM} }}",
            "one is broadcast",
            {**GAMMA, "bias": (8,)},
        ),
        NearMiss("a difference", f"{ONE_OUTPUT} {{ h = Sub(x, residual) {NORM} }}", None, GAMMA),
        NearMiss("no sum", f"{SIGNATURE} {{ h = Neg(x) {NORM} }}", None, GAMMA),
    )
    counts = (
        ("qwen2-builder", 4),
        ("qwen2-dynamo-sdpa", 4),
        ("qwen2-optimum", 4),
        ("qwen3-builder", 4),
        ("qwen3-optimum", 4),
    )
