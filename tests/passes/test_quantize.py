"""Quantization of weights, and of activations per token: what the float graph becomes, and how near it stays."""

import pytest

from qcompile.errors import QuantError
from qcompile.passes.quantize_int4 import QuantizeInt4
from qcompile.passes.quantize_int8 import QuantizeInt8, QuantizeInt8Dynamic, QuantizeInt8Static
from tests.passes.graph_text import expressions, model_bytes
from tests.passes.six_tests import Example, NearMiss, SixTests

X, Y = "float[batch_size, sequence_length, 64]", "float[batch_size, sequence_length, 48]"
SIGNATURE = f"({X} x) => ({Y} y)"
WEIGHTS = {"w": (64, 48), "b": (48,)}
# Rounding errors with random signs over 64 inputs, relative to the largest of the outputs.
OF_INT8 = {"float": 1e-2, "float16": 2e-2}
OF_INT8_BOTH = {"float": 2e-2, "float16": 3e-2}
OF_INT4 = {"float": 0.2, "float16": 0.2}
FLOAT = (
    NearMiss("the second operand is computed", f"({X} x, float[64, 48] v) => ({Y} y) {{ y = MatMul(x, v) }}", None),
    NearMiss(
        "a batch of matrices",
        "(float[3, sequence_length, 64] x) => (float[3, sequence_length, 48] y) { y = MatMul(x, w) }",
        None,
        {"w": (3, 64, 48)},
    ),
    NearMiss("no projection", f"({X} x) => ({X} y) {{ y = Mul(x, g) }}", None, {"g": (64,)}),
)
GRAPHS = (
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


class Quantization(SixTests):
    """The second run refuses instead of doing nothing: quantizing codes again would be a mistake worth telling."""

    examples = GRAPHS
    near_misses = FLOAT

    def test_second_run_changes_nothing(self, example, dtype):
        context = self.outcome(example, dtype).context
        before = model_bytes(context.model)
        with pytest.raises(QuantError, match="already quantized"):
            self.run(context)
        assert model_bytes(context.model) == before


class TestQuantizeInt8(Quantization):
    pass_class = QuantizeInt8
    limits = OF_INT8
    counts = (("qwen2-builder", 10), ("qwen3-builder", 10))

    def test_the_bias_stays_float(self):
        y = expressions(self.outcome(GRAPHS[1], "float").context.model)["y"]
        assert y.startswith("Add(qcompile::LinearW8(x, ")
        assert y.endswith(", b)")


class TestQuantizeInt8Dynamic(Quantization):
    pass_class = QuantizeInt8Dynamic
    limits = OF_INT8_BOTH
    counts = (("qwen2-builder", 0),)


class TestQuantizeInt4(Quantization):
    pass_class = QuantizeInt4
    limits = OF_INT4
    counts = (("qwen2-builder", 0),)


def test_static_steps_need_calibration():
    context = TestQuantizeInt8.prepared(GRAPHS[0].before, WEIGHTS, "float", 18)
    before = model_bytes(context.model)
    with pytest.raises(QuantError, match="static activations needs calibration data"):
        QuantizeInt8Static()(context)
    assert model_bytes(context.model) == before
