import pytest

from qcompile.errors import QuantError
from qcompile.passes.quantize_int8 import QuantizeInt8
from tests.passes.graph_text import model_bytes
from tests.passes.six_tests import Example, NearMiss, SixTests

X, Y = "float[batch_size, sequence_length, 64]", "float[batch_size, sequence_length, 48]"
SIGNATURE = f"({X} x) => ({Y} y)"
WEIGHTS = {"w": (64, 48), "b": (48,)}
# Half a step of 127 per weight, summed over 64 inputs with random signs.
ROUNDED = {"float": 1e-2, "float16": 2e-2}


class TestQuantizeInt8(SixTests):
    pass_class = QuantizeInt8
    limits = ROUNDED
    examples = (
        Example("projection", f"{SIGNATURE} {{ y = MatMul(x, w) }}", None, WEIGHTS),
        Example("projection with a bias", f"{SIGNATURE} {{ y = qcompile.Linear(x, w, b) }}", None, WEIGHTS),
        Example(
            "two projections",
            f"({X} x) => ({Y} y, {Y} z) {{ y = MatMul(x, w) z = MatMul(x, v) }}",
            None,
            {**WEIGHTS, "v": (64, 48)},
            rewrites=2,
        ),
        Example(
            "one weight, two readers",
            f"({X} x, {X} u) => ({Y} y, {Y} z) {{ y = MatMul(x, w) z = MatMul(u, w) }}",
            None,
            WEIGHTS,
            rewrites=2,
        ),
    )
    near_misses = (
        NearMiss("the second operand is computed", f"({X} x, float[64, 48] v) => ({Y} y) {{ y = MatMul(x, v) }}", None),
        NearMiss(
            "a batch of matrices",
            "(float[3, sequence_length, 64] x) => (float[3, sequence_length, 48] y) { y = MatMul(x, w) }",
            None,
            {"w": (3, 64, 48)},
        ),
        NearMiss("no projection", f"({X} x) => ({X} y) {{ y = Mul(x, g) }}", None, {"g": (64,)}),
    )
    counts = (("qwen2-builder", 10), ("qwen3-builder", 10))

    def test_second_run_changes_nothing(self, example, dtype):
        context = self.outcome(example, dtype).context
        before = model_bytes(context.model)
        with pytest.raises(QuantError, match="already quantized"):
            self.run(context)
        assert model_bytes(context.model) == before
