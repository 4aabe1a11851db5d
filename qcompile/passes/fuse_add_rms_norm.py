"""Fuse a residual Add and the RMSNorm after it into qcompile::AddRmsNorm.

    h = x + residual
    y = h * rsqrt(mean(h * h, -1) + eps) * gamma

x, residual, h, y: float [..., D]; gamma: [D]. h may have other readers: the next residual Add is one.
Source: Zhang & Sennrich 2019, eq. 4; the residual form is the one of Qwen2DecoderLayer.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from qcompile.functions import ADD_RMS_NORM, DOMAIN
from qcompile.passes.rule import FusionRule, RulePass, require_same_shape


class AddRmsNorm(FusionRule):
    """Add, then RmsNorm."""

    emits = ADD_RMS_NORM
    landmark = "RmsNorm"

    def pattern(self, op: Any, x: Any, residual: Any, gamma: Any, epsilon: Any) -> Any:
        h = op.Add(x, residual)
        return op.RmsNorm(h, gamma, epsilon=epsilon, _domain=DOMAIN), h

    def require(self, x: ir.Value, residual: ir.Value, **_: Any) -> None:
        require_same_shape(self, x, residual)

    def rewrite(self, op: Any, x: ir.Value, residual: ir.Value, gamma: ir.Value, epsilon: ir.Attr, **_: Any) -> Any:
        return self.emit(op, x, residual, gamma, epsilon=epsilon.as_float())


class FuseAddRmsNorm(RulePass):
    """Residual additions followed by a root-mean-square norm."""

    name = "fuse-add-rms-norm"
    summary = "x + residual, then RmsNorm -> AddRmsNorm"
    rules = (AddRmsNorm,)
