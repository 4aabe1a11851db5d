"""Fuse a projection and the Add of its bias into qcompile::Linear.

    y = x @ W + b

x: float [..., M]; W: weight [M, N]; b: weight [N]; y: [..., N].
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from qcompile.functions import LINEAR
from qcompile.passes.rule import FusionRule, Mismatch, Reject, RulePass, is_weight


class Linear(FusionRule):
    """MatMul by a weight, plus a bias vector."""

    emits = LINEAR
    landmark = "MatMul"

    def pattern(self, op: Any, x: Any, weight: Any, bias: Any) -> Any:
        return op.Add(op.MatMul(x, weight), bias)

    def require(self, x: ir.Value, weight: ir.Value, bias: ir.Value, **_: Any) -> None:
        if not is_weight(bias) or not is_weight(weight):
            raise Mismatch  # a residual sum, or scores and their mask
        if len(self.specs(weight)[0].shape) != 2:
            raise Reject(f"weight '{weight.name}' has shape {list(self.specs(weight)[0].shape)}, wanted [M, N]")
        bound: dict[str, list[int]] = {}
        self.dims(bound, weight, "M N")
        self.dims(bound, bias, "N")
        if len(self.specs(x)[0].shape) < 2:
            raise Reject(f"'{x.name}' is a vector")

    def rewrite(self, op: Any, x: ir.Value, weight: ir.Value, bias: ir.Value, **_: Any) -> Any:
        return self.emit(op, x, weight, bias)


class FuseLinear(RulePass):
    """Projections with a bias."""

    name = "fuse-linear"
    summary = "MatMul + bias -> Linear"
    rules = (Linear,)
