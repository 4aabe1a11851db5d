"""Pack the gate and up projections of a SwiGLU feed-forward into a single projection.

    gate = x @ Wg,  up = x @ Wu   ->   gate, up = Split(x @ [Wg | Wu])

x: float [B, S, D]; Wg, Wu: [D, F]. The projections are those that a qcompile::SwiGlu reads.
"""

from __future__ import annotations

import onnx_ir as ir

from qcompile.functions import DOMAIN
from qcompile.passes.base import Pass, PassContext, PassResult, Rejection
from qcompile.passes.change import finish_rewrites, node_label
from qcompile.passes.pack import is_projection, pack


class FuseGateUp(Pass):
    """Gate and up projections."""

    name = "fuse-gate-up"
    summary = "gate, up projections -> one projection and a Split"

    def call(self, context: PassContext, result: PassResult) -> None:
        """Pack for every SwiGlu whose two inputs are projections of one value."""
        for node in list(context.model.graph):
            if (node.domain, node.op_type) != (DOMAIN, "SwiGlu"):
                continue
            reason = _obstacle(node)
            if reason:
                result.rejected.append(Rejection(node_label(node), "GateUp", reason))
                continue
            projections = [v.producer() for v in node.inputs if v is not None]
            pack(context, result, "GateUp", [p for p in projections if p is not None], "gate_up_proj")
        if result.rewrites:
            finish_rewrites(context)

    def explain(self, context: PassContext) -> list[Rejection]:
        """Say for each SwiGlu why its projections are not packed."""
        calls = [n for n in context.model.graph if (n.domain, n.op_type) == (DOMAIN, "SwiGlu")]
        misses = [Rejection(node_label(n), "GateUp", _obstacle(n)) for n in calls if _obstacle(n)]
        if not calls:
            return [Rejection("graph", "GateUp", "there is no SwiGlu; run fuse-swiglu first")]
        return misses


def _obstacle(swiglu: ir.Node) -> str:
    producers = [v.producer() if v is not None else None for v in swiglu.inputs]
    if not all(is_projection(p) for p in producers):
        return "gate or up does not come from a projection by a weight"
    if len({p.inputs[0] for p in producers if p is not None}) != 1:
        return "gate and up are projections of different values"
    return ""
