"""Fuse the gate of a SwiGLU feed-forward into qcompile::SwiGlu.

    y = gate * sigmoid(gate) * up

gate, up, y: float [..., F]. Source: Shazeer 2020, eq. 6, without the projections.
"""

from __future__ import annotations

from qcompile.functions import SWI_GLU
from qcompile.passes.rule import FusionRule, RulePass, require_same_shape


class SwiGlu(FusionRule):
    """SiLU of one projection times another."""

    emits = SWI_GLU

    def pattern(self, op, gate, up):
        return op.Mul(op.Mul(gate, op.Sigmoid(gate)), up)

    def require(self, gate, up, **_):
        require_same_shape(self, gate, up)

    def rewrite(self, op, gate, up, **_):
        return self.emit(op, gate, up)


class FuseSwiGlu(RulePass):
    """Gated feed-forward activations."""

    name = "fuse-swiglu"
    summary = "gate * sigmoid(gate) * up -> SwiGlu"
    rules = (SwiGlu,)
