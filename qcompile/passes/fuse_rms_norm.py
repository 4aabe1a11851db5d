"""Fuse the primitive chain of a root-mean-square norm into qcompile::RmsNorm.

    y = x * rsqrt(mean(x * x, -1) + eps) * gamma

x, y: float32 | float16 | bfloat16 [..., D]; gamma: [D]; eps: constant scalar. In half precision the chain runs in
float32 between two Casts, as transformers' Qwen2RMSNorm does.
Source: Zhang & Sennrich 2019, eq. 4.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from qcompile.functions import RMS_NORM
from qcompile.passes.rule import FusionRule, Reject, RulePass, require_row_weight, scalar


def normalized(op: Any, x: Any, eps: Any) -> Any:
    """The canonical chain before gamma: x * Reciprocal(Sqrt(mean(x * x) + eps))."""
    square = op.Mul(x, x)
    mean = op.ReduceMean(square, [-1], keepdims=1)
    return op.Mul(x, op.Reciprocal(op.Sqrt(op.Add(mean, eps))))


class RmsNorm(FusionRule):
    """The chain in the dtype of the graph."""

    emits = RMS_NORM

    def pattern(self, op, x, gamma, eps):
        return op.Mul(normalized(op, x, eps), gamma)

    def require(self, x, gamma, eps, **_):
        scalar(eps, "epsilon")
        require_row_weight(self, x, gamma, "gamma")

    def rewrite(self, op, x, gamma, eps, **_):
        return self.emit(op, x, gamma, epsilon=scalar(eps))


class RmsNormInFloat32(FusionRule):
    """The chain between Cast(x, float32) and a Cast back, in half-precision graphs."""

    emits = RMS_NORM

    def pattern(self, op, x, gamma, eps, to):
        x32 = op.Cast(x, to=ir.DataType.FLOAT)
        return op.Mul(op.Cast(normalized(op, x32, eps), to=to), gamma)

    def require(self, x, gamma, eps, to, **_):
        scalar(eps, "epsilon")
        require_row_weight(self, x, gamma, "gamma")
        dtype = self.specs(x)[0].dtype
        if ir.DataType(to.as_int()) != dtype:
            raise Reject(f"the norm returns {ir.DataType(to.as_int()).name} for an input of {dtype.name}")

    def rewrite(self, op, x, gamma, eps, **_):
        return self.emit(op, x, gamma, epsilon=scalar(eps))


class FuseRmsNorm(RulePass):
    """Root-mean-square norms."""

    name = "fuse-rms-norm"
    summary = "x * rsqrt(mean(x^2) + eps) * gamma -> RmsNorm"
    rules = (RmsNorm, RmsNormInFloat32)
