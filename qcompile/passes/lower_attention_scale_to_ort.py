"""Fold the scale of GroupQueryAttention into its rotary tables, so that the kernel multiplies queries and keys as they are.

    GroupQueryAttention<scale = s>(q, k, v, past_key, ..., cos, sin)
        -> GroupQueryAttention<scale = 1>(q, k, v, past_key', ..., cos r, sin r)        r = sqrt(s), past_key' = past_key r

Queries and keys turn by the same tables, so their products are s times as large. ONNX Runtime's product of one row has a
fast path that wants a factor of 1 (`qcompile.runtime.attention_kernel`). The cache holds keys times r: it belongs to the graph
that writes it. Caches of int8 keep the scale, as their own scales are calibrated; so do tables in half precision, where r
would be rounded.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from qcompile.passes.base import Pass, PassContext, PassResult, Rejection
from qcompile.passes.change import finish_rewrites, named_constant, node_label
from qcompile.passes.gqa_proof import prove_folded_scale
from qcompile.passes.lower_rotary_tables_to_ort import COS, SIN, tables_of
from qcompile.passes.rope_table import RopeTable

_PAST_KEY, _PRESENT_KEY = 3, 1


class LowerAttentionScaleToOrt(Pass):
    """The scale of attention."""

    name = "lower-attention-scale-to-ort"
    summary = "scale of GroupQueryAttention -> rotary tables"

    def call(self, context: PassContext, result: PassResult) -> None:
        """Fold the scale of every kernel that rotates by constant tables and keeps its keys to itself."""
        graph = context.model.graph
        for (cos, sin), readers in tables_of(graph).items():
            for node in readers:
                if _scale(node) == 1:
                    continue
                result.matches += 1
                reason = _obstacle(graph, node, cos) or _fold(context, result, node, cos, sin)
                if reason:
                    result.rejected.append(Rejection(node_label(node), self.name, reason))
                else:
                    result.rewrites += 1
        if result.rewrites:
            finish_rewrites(context)


def _scale(node: ir.Node) -> float:
    """Return the attribute; none or zero stands for the kernel's default, which no graph of ours leaves it to."""
    attribute = node.attributes.get("scale")
    return attribute.as_float() if attribute is not None else 0.0


def _obstacle(graph: ir.Graph, node: ir.Node, cos: ir.Value) -> str:
    past = node.inputs[_PAST_KEY]
    present = node.outputs[_PRESENT_KEY] if len(node.outputs) > _PRESENT_KEY else None
    scale = _scale(node)
    if not (scale > 0 and math.isfinite(scale)):
        return f"its scale is {scale:g}"
    rotary = node.attributes.get("do_rotary")
    if rotary is None or rotary.as_int() != 1:
        return "it has tables but does not rotate by them"
    if past is None or past.dtype != ir.DataType.FLOAT or cos.dtype != ir.DataType.FLOAT:
        dtype = past.dtype if past is not None else None
        return f"its cache is {dtype}, its tables are {cos.dtype}; only float32 is folded"
    is_written_only = present is not None and present in graph.outputs and not present.uses()
    if past not in graph.inputs or len(past.uses()) != 1 or not is_written_only:
        return "its keys are read elsewhere too"
    return ""


def _fold(context: PassContext, result: PassResult, node: ir.Node, cos: ir.Value, sin: ir.Value) -> str:
    """Prove it and do it; return why not, or nothing."""
    assert cos.const_value is not None
    assert sin.const_value is not None
    scale = _scale(node)
    root = np.float32(math.sqrt(scale))
    table = RopeTable(np.asarray(cos.const_value.numpy()), np.asarray(sin.const_value.numpy()))
    folded = RopeTable(table.cos * root, table.sin * root)
    if context.prover is not None:
        reason, error = prove_folded_scale(node, table, folded, root, context.prover)
        result.max_error = max(result.max_error, error)
        if reason:
            return f"rolled back: {reason}"
        result.proved += 1
    for index, old, array in zip((COS, SIN), (cos, sin), (folded.cos, folded.sin), strict=True):
        made = named_constant(context.model.graph, f"{old.name}.times_root_of_{scale:.9g}", array)
        node.replace_input_with(index, made)
    node.attributes["scale"] = ir.AttrFloat32("scale", 1.0)
    return ""
