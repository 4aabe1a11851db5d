"""Fuse the gate of a SwiGLU feed-forward into qcompile::SwiGlu.

    y = gate * sigmoid(gate) * up

gate, up, y: float [..., F]. Source: Shazeer 2020, eq. 6, without the projections.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from qcompile.functions import SWI_GLU
from qcompile.passes.rule import FusionRule, RulePass, require_same_shape


class SwiGlu(FusionRule):
    """SiLU of one projection times another."""

    emits = SWI_GLU
    landmark = "Sigmoid"

    def pattern(self, op: Any, gate: Any, up: Any) -> Any:
        return op.Mul(op.Mul(gate, op.Sigmoid(gate)), up)

    def require(self, gate: ir.Value, up: ir.Value, **_: Any) -> None:
        require_same_shape(self, gate, up)

    def rewrite(self, op: Any, gate: ir.Value, up: ir.Value, **_: Any) -> Any:
        return self.emit(op, gate, up)


class SwiGluGateLast(SwiGlu):
    """The same with the gate multiplied last: sigmoid(gate) * up * gate."""

    def pattern(self, op: Any, gate: Any, up: Any) -> Any:
        return op.Mul(op.Mul(up, op.Sigmoid(gate)), gate)


class FuseSwiGlu(RulePass):
    """Gated feed-forward activations."""

    name = "fuse-swiglu"
    summary = "gate * sigmoid(gate) * up -> SwiGlu"
    rules = (SwiGlu, SwiGluGateLast)
