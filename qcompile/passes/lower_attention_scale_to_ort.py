"""Fold the scale of GroupQueryAttention into its rotary tables, so that the kernel multiplies queries and keys as they are.

    GroupQueryAttention<scale = s>(q, k, v, past_key, ..., cos, sin)
        -> GroupQueryAttention<scale = 1>(q, k, v, past_key', ..., cos r, sin r)        r = sqrt(s), past_key' = past_key r

Queries and keys turn by the same tables, so their products are s times as large. ONNX Runtime's product of one row has a
fast path that wants a factor of 1 (`qcompile.runtime.attention_kernel`). The cache holds keys times r: it belongs to the graph
that writes it. Kernels with a cache of int8 are passed over, as their own scales are calibrated; tables in half precision
stay, where r would be rounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
            folded: dict[float, _Folded] = {}
            for node in readers:
                scale = _scale(node)
                if scale == 1 or _has_int8_cache(node):
                    continue
                result.matches += 1
                reason = _obstacle(graph, node, cos)
                if not reason:
                    if scale not in folded:
                        folded[scale] = _Folded.of(cos, sin, scale)
                    reason = _fold(context, result, node, folded[scale])
                if reason:
                    result.rejected.append(Rejection(node_label(node), self.name, reason))
                else:
                    result.rewrites += 1
        if result.rewrites:
            finish_rewrites(context)


@dataclass(frozen=True)
class _Folded:
    """Two tables, the root of a scale, and what they are times that root, with the names of those."""

    names: tuple[str, str]
    root: np.float32
    before: RopeTable
    after: RopeTable

    @classmethod
    def of(cls, cos: ir.Value, sin: ir.Value, scale: float) -> _Folded:
        assert cos.const_value is not None
        assert sin.const_value is not None
        root = np.float32(math.sqrt(scale))
        table = RopeTable(np.asarray(cos.const_value.numpy()), np.asarray(sin.const_value.numpy()))
        suffix = f"times_root_of_{scale:.9g}"
        names = (f"{cos.name}.{suffix}", f"{sin.name}.{suffix}")
        return cls(names, root, table, RopeTable(table.cos * root, table.sin * root))


def _has_int8_cache(node: ir.Node) -> bool:
    past = node.inputs[_PAST_KEY]  # the tables come after it
    return past is not None and past.dtype == ir.DataType.INT8


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


def _fold(context: PassContext, result: PassResult, node: ir.Node, folded: _Folded) -> str:
    """Prove it and do it; return why not, or nothing."""
    if context.prover is not None:
        reason, error = prove_folded_scale(node, folded.before, folded.after, folded.root, context.prover)
        result.max_error = max(result.max_error, error)
        if reason:
            return f"rolled back: {reason}"
        result.proved += 1
    for index, name, array in zip((COS, SIN), folded.names, (folded.after.cos, folded.after.sin), strict=True):
        node.replace_input_with(index, named_constant(context.model.graph, name, array))
    node.attributes["scale"] = ir.AttrFloat32("scale", 1.0)
    return ""
