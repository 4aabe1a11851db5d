"""Fuse LayerNormalization, or the primitive chain of it, into qcompile::LayerNorm.

    y = (x - mean(x)) * rsqrt(mean((x - mean(x))^2) + eps) * gamma + beta

x, y: float [..., D]; gamma, beta: [D]; eps: constant scalar.
Source: Ba et al. 2016, eq. 4.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from qcompile.functions import LAYER_NORM
from qcompile.passes.fuse_rms_norm import norm_epsilon, normalized, require_last_axis
from qcompile.passes.rule import FusionRule, Reject, RulePass, require_row_weight, scalar


class LayerNormChain(FusionRule):
    """The chain of primitive operators."""

    emits = LAYER_NORM
    landmark = "Sub"

    def pattern(self, op: Any, x: Any, gamma: Any, beta: Any, eps: Any) -> Any:
        centred = op.Sub(x, op.ReduceMean(x, [-1]))
        return op.Add(op.Mul(normalized(op, centred, eps), gamma), beta)

    def require(self, x: ir.Value, gamma: ir.Value, beta: ir.Value, eps: ir.Value, **_: Any) -> None:
        scalar(eps, "epsilon")
        require_row_weight(self, x, gamma, "gamma")
        require_row_weight(self, x, beta, "beta")

    def rewrite(self, op: Any, x: ir.Value, gamma: ir.Value, beta: ir.Value, eps: ir.Value, **_: Any) -> Any:
        return self.emit(op, x, gamma, beta, epsilon=scalar(eps))


class LayerNormalization(FusionRule):
    """The standard operator of opset 17 and later."""

    emits = LAYER_NORM
    landmark = "LayerNormalization"

    def pattern(self, op: Any, x: Any, gamma: Any, beta: Any) -> Any:
        return op.LayerNormalization(x, gamma, beta, _outputs=["y"])

    def require(self, x: ir.Value, gamma: ir.Value, beta: ir.Value, y: ir.Value, **_: Any) -> None:
        require_last_axis(self, x, y)
        require_row_weight(self, x, gamma, "gamma")
        require_row_weight(self, x, beta, "beta")

    def rewrite(self, op: Any, x: ir.Value, gamma: ir.Value, beta: ir.Value, y: ir.Value, **_: Any) -> Any:
        return self.emit(op, x, gamma, beta, epsilon=norm_epsilon(y))


class LayerNormalizationWithoutBeta(FusionRule):
    """The standard operator without a beta: not fused, and said to be so."""

    landmark = "LayerNormalization"

    def pattern(self, op: Any, x: Any, gamma: Any) -> Any:
        return op.LayerNormalization(x, gamma)

    def require(self, **_: Any) -> None:
        raise Reject("it has no beta")

    def rewrite(self, op: Any, x: ir.Value, gamma: ir.Value, **_: Any) -> Any:
        return op.LayerNormalization(x, gamma)


class FuseLayerNorm(RulePass):
    """Layer norms."""

    name = "fuse-layer-norm"
    summary = "(x - mean) / sqrt(var + eps) * gamma + beta -> LayerNorm"
    rules = (LayerNormChain, LayerNormalization, LayerNormalizationWithoutBeta)
