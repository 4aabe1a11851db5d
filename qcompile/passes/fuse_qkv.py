"""Pack the query, key and value projections of one attention into a single projection.

    q = x @ Wq + bq,  k = x @ Wk + bk,  v = x @ Wv + bv   ->   q, k, v = Split(x @ [Wq | Wk | Wv] + [bq | bk | bv])

x: float [B, S, D]; Wq: [D, H*d]; Wk, Wv: [D, K*d]. The projections are those that a qcompile::Attention reads, through
Reshape and (Qwen3) the RmsNorm of each head.
"""

from __future__ import annotations

import onnx_ir as ir

from qcompile.functions import DOMAIN
from qcompile.passes.base import Pass, PassContext, PassResult, Rejection
from qcompile.passes.change import finish_rewrites, node_label
from qcompile.passes.pack import is_projection, pack

_TRANSPARENT = {"Reshape", "RmsNorm", "Identity"}


class FuseQkv(Pass):
    """Query, key and value projections."""

    name = "fuse-qkv"
    summary = "q, k, v projections -> one projection and a Split"

    def call(self, context: PassContext, result: PassResult) -> None:
        """Pack for every Attention whose three inputs come from projections of one value."""
        for node in list(context.model.graph):
            if (node.domain, node.op_type) != (DOMAIN, "Attention"):
                continue
            projections, reason = _projections(node)
            if reason:
                result.rejected.append(Rejection(node_label(node), "Qkv", reason))
                continue
            pack(context, result, "Qkv", projections, "qkv_proj")
        if result.rewrites:
            finish_rewrites(context)

    def explain(self, context: PassContext) -> list[Rejection]:
        """Say for each Attention why its projections are not packed."""
        misses = []
        for node in context.model.graph:
            if (node.domain, node.op_type) == (DOMAIN, "Attention"):
                reason = _projections(node)[1]
                if reason:
                    misses.append(Rejection(node_label(node), "Qkv", reason))
        return misses or [Rejection("graph", "Qkv", "there is no Attention; run fuse-attention first")]


def _projections(attention: ir.Node) -> tuple[list[ir.Node], str]:
    found: list[ir.Node] = []
    for value in attention.inputs[:3]:
        node = value.producer() if value is not None else None
        while node is not None and node.op_type in _TRANSPARENT and node.inputs[0] is not None:
            node = node.inputs[0].producer()
        if node is None or not is_projection(node):
            seen = f"{node.op_type} '{node_label(node)}'" if node is not None else "an input"
            return [], f"q, k or v comes from {seen}, not from a projection by a weight"
        found.append(node)
    if len({n.inputs[0] for n in found}) != 1:
        return [], "q, k and v are projections of different values"
    return found, ""
