"""Fuse a residual Add and the LayerNorm after it into qcompile::AddLayerNorm.

    h = x + residual
    y = LayerNorm(h)

x, residual, h, y: float [..., D]; gamma, beta: [D]. h may have other readers.
"""

from __future__ import annotations

from qcompile.functions import ADD_LAYER_NORM, DOMAIN
from qcompile.passes.rule import FusionRule, RulePass, require_same_shape


class AddLayerNorm(FusionRule):
    """Add, then LayerNorm."""

    emits = ADD_LAYER_NORM

    def pattern(self, op, x, residual, gamma, beta, epsilon):
        h = op.Add(x, residual)
        return op.LayerNorm(h, gamma, beta, epsilon=epsilon, _domain=DOMAIN), h

    def require(self, x, residual, **_):
        require_same_shape(self, x, residual)

    def rewrite(self, op, x, residual, gamma, beta, epsilon, **_):
        return self.emit(op, x, residual, gamma, beta, epsilon=epsilon.as_float())


class FuseAddLayerNorm(RulePass):
    """Residual additions followed by a layer norm."""

    name = "fuse-add-layer-norm"
    summary = "x + residual, then LayerNorm -> AddLayerNorm"
    rules = (AddLayerNorm,)
