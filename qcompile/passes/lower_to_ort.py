"""Replace fused operators by ONNX Runtime's own kernels where it has one (CPU, domain com.microsoft).

    RmsNorm      -> SimplifiedLayerNormalization            AddRmsNorm   -> SkipSimplifiedLayerNormalization
    LayerNorm    -> LayerNormalization                      AddLayerNorm -> SkipLayerNormalization
    Linear       -> MatMul + Add                            SwiGlu       -> QuickGelu(alpha = 1) * up
    Gelu         -> com.microsoft Gelu                      GeluTanh     -> FastGelu

Each replacement is proved against the function it replaces. Attention is lowered by `lower_attention_to_ort`, because
it changes the graph's interface, quantized projections by `lower_quantized_*`. What has no kernel is inlined at the end.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from qcompile.functions import DOMAIN
from qcompile.passes.rule import FusionRule, RulePass

MICROSOFT = "com.microsoft"


class LowerRmsNorm(FusionRule):
    """ORT registers SimplifiedLayerNormalization in the standard domain."""

    def pattern(self, op: Any, x: Any, gamma: Any, epsilon: Any) -> Any:
        return op.RmsNorm(x, gamma, epsilon=epsilon, _domain=DOMAIN)

    def rewrite(self, op: Any, x: ir.Value, gamma: ir.Value, epsilon: ir.Attr, **_: Any) -> Any:
        return op.SimplifiedLayerNormalization(x, gamma, axis=-1, epsilon=epsilon.as_float(), stash_type=1)


class LowerAddRmsNorm(FusionRule):
    """Outputs 1 and 2 (mean, inverse deviation) are left out; output 3 is the sum."""

    def pattern(self, op: Any, x: Any, residual: Any, gamma: Any, epsilon: Any) -> Any:
        return op.AddRmsNorm(x, residual, gamma, epsilon=epsilon, _domain=DOMAIN, _outputs=["y", "h"])

    def rewrite(self, op: Any, x: ir.Value, residual: ir.Value, gamma: ir.Value, epsilon: ir.Attr, **_: Any) -> Any:
        y, _mean, _deviation, h = op.SkipSimplifiedLayerNormalization(
            x, residual, gamma, epsilon=epsilon.as_float(), _domain=MICROSOFT, _version=1, _outputs=_with_gap()
        )
        return y, h


class LowerLayerNorm(FusionRule):
    """The standard operator of opset 17."""

    def pattern(self, op: Any, x: Any, gamma: Any, beta: Any, epsilon: Any) -> Any:
        return op.LayerNorm(x, gamma, beta, epsilon=epsilon, _domain=DOMAIN)

    def rewrite(self, op: Any, x: ir.Value, gamma: ir.Value, beta: ir.Value, epsilon: ir.Attr, **_: Any) -> Any:
        return op.LayerNormalization(x, gamma, beta, axis=-1, epsilon=epsilon.as_float())


class LowerAddLayerNorm(FusionRule):
    """As LowerAddRmsNorm, with beta."""

    def pattern(self, op: Any, x: Any, residual: Any, gamma: Any, beta: Any, epsilon: Any) -> Any:
        return op.AddLayerNorm(x, residual, gamma, beta, epsilon=epsilon, _domain=DOMAIN, _outputs=["y", "h"])

    def rewrite(
        self, op: Any, x: ir.Value, residual: ir.Value, gamma: ir.Value, beta: ir.Value, epsilon: ir.Attr, **_: Any
    ) -> Any:
        y, _mean, _deviation, h = op.SkipLayerNormalization(
            x, residual, gamma, beta, epsilon=epsilon.as_float(), _domain=MICROSOFT, _version=1, _outputs=_with_gap()
        )
        return y, h


class LowerLinear(FusionRule):
    """MatMul packs its weight once and takes any rank; benchmarks/linear_spelling.py compares it with Gemm."""

    def pattern(self, op: Any, x: Any, weight: Any, bias: Any) -> Any:
        return op.Linear(x, weight, bias, _domain=DOMAIN)

    def rewrite(self, op: Any, x: ir.Value, weight: ir.Value, bias: ir.Value, **_: Any) -> Any:
        return op.Add(op.MatMul(x, weight), bias)


class LowerSwiGlu(FusionRule):
    """QuickGelu(x, alpha) = x * sigmoid(alpha x): one pass over the gate instead of two."""

    def pattern(self, op: Any, gate: Any, up: Any) -> Any:
        return op.SwiGlu(gate, up, _domain=DOMAIN)

    def rewrite(self, op: Any, gate: ir.Value, up: ir.Value, **_: Any) -> Any:
        return op.Mul(op.QuickGelu(gate, alpha=1.0, _domain=MICROSOFT, _version=1), up)


class LowerGelu(FusionRule):
    """Exact GELU."""

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Gelu(x, _domain=DOMAIN)

    def rewrite(self, op: Any, x: ir.Value, **_: Any) -> Any:
        return op.Gelu(x, _domain=MICROSOFT, _version=1)


class LowerGeluTanh(FusionRule):
    """GELU by tanh."""

    def pattern(self, op: Any, x: Any) -> Any:
        return op.GeluTanh(x, _domain=DOMAIN)

    def rewrite(self, op: Any, x: ir.Value, **_: Any) -> Any:
        return op.FastGelu(x, _domain=MICROSOFT, _version=1)


def _with_gap() -> list[ir.Value]:
    """Four outputs of which the second and third are absent."""
    return [ir.Value(), ir.Value(name=""), ir.Value(name=""), ir.Value()]


class LowerToOrt(RulePass):
    """Fused operators with a kernel in ONNX Runtime."""

    name = "lower-to-ort"
    summary = "fused operators -> ONNX Runtime's kernels"
    rules = (
        LowerRmsNorm,
        LowerAddRmsNorm,
        LowerLayerNorm,
        LowerAddLayerNorm,
        LowerLinear,
        LowerSwiGlu,
        LowerGelu,
        LowerGeluTanh,
    )
