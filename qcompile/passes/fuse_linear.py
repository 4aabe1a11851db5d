"""Fuse a projection and the Add of its bias into qcompile::Linear.

    y = x @ W + b

x: float [..., M]; W: weight [M, N]; b: weight [N]; y: [..., N].
"""

from __future__ import annotations

from qcompile.functions import LINEAR
from qcompile.passes.rule import FusionRule, Reject, RulePass, is_weight


class Linear(FusionRule):
    """MatMul by a weight, plus a bias vector."""

    emits = LINEAR

    def pattern(self, op, x, weight, bias):
        return op.Add(op.MatMul(x, weight), bias)

    def require(self, x, weight, bias, **_):
        if not is_weight(weight) or len(self.specs(weight)[0].shape) != 2:
            raise Reject("the second operand of MatMul is not a weight [M, N]")
        if not is_weight(bias):
            raise Reject("what is added is not a weight")
        bound: dict[str, list[int]] = {}
        self.dims(bound, weight, "M N")
        self.dims(bound, bias, "N")

    def rewrite(self, op, x, weight, bias, **_):
        return self.emit(op, x, weight, bias)


class FuseLinear(RulePass):
    """Projections with a bias."""

    name = "fuse-linear"
    summary = "MatMul + bias -> Linear"
    rules = (Linear,)
