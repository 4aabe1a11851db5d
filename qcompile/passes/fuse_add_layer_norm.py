"""Fuse a residual Add and the LayerNorm after it into qcompile::AddLayerNorm.

    h = x + residual
    y = LayerNorm(h)

x, y, residual, h: float [..., D]; gamma, beta: [D]. h may have other readers.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from qcompile.functions import ADD_LAYER_NORM, DOMAIN
from qcompile.passes.rule import FusionRule, RulePass, require_same_shape


class AddLayerNorm(FusionRule):
    """Add, then LayerNorm."""

    emits = ADD_LAYER_NORM
    landmark = "LayerNorm"

    def pattern(self, op: Any, x: Any, residual: Any, gamma: Any, beta: Any, epsilon: Any) -> Any:
        h = op.Add(x, residual)
        return op.LayerNorm(h, gamma, beta, epsilon=epsilon, _domain=DOMAIN), h

    def require(self, x: ir.Value, residual: ir.Value, **_: Any) -> None:
        require_same_shape(self, x, residual)

    def rewrite(
        self,
        op: Any,
        x: ir.Value,
        residual: ir.Value,
        gamma: ir.Value,
        beta: ir.Value,
        epsilon: ir.Attr,
        **_: Any,
    ) -> Any:
        return self.emit(op, x, residual, gamma, beta, epsilon=epsilon.as_float())


class FuseAddLayerNorm(RulePass):
    """Residual additions followed by a layer norm."""

    name = "fuse-add-layer-norm"
    summary = "x + residual, then LayerNorm -> AddLayerNorm"
    rules = (AddLayerNorm,)
