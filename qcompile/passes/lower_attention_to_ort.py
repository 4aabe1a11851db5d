"""Lower qcompile::Attention to ONNX Runtime's GroupQueryAttention, with past and present in one shared buffer.

    Attention(q, k, v, past, cos, sin, attention_mask)
        -> GroupQueryAttention(qkv, past, seqlens_k, total_sequence_length, cos_cache, sin_cache)

The graph's interface changes: attention_mask and position_ids go, `seqlens_k` int32 [B] and `total_sequence_length`
int32 come, and past_key_values.* / present.* are one buffer [B, K, T_max, d] written in place (see
`qcompile.runtime.manifest.GraphIO`). cos and sin become tables by position; where they cannot (dynamic NTK), the rotary
embedding stays outside the kernel and position_ids stays an input.
Every lowered attention is compared with the function it replaces, on caches with rows of different lengths.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompile.functions import DOMAIN
from qcompile.passes.base import Pass, PassContext, PassResult, Rejection
from qcompile.passes.change import finish_rewrites, named_constant, node_label
from qcompile.passes.gqa_proof import prove_lowered_attention
from qcompile.passes.lower_to_ort import MICROSOFT
from qcompile.passes.rope_table import RopeTable, tabulate

DEFAULT_MAX_POSITION = 32768
# ONNX Runtime's kernel refuses to rotate heads of other sizes.
_ROTARY_MULTIPLE = 16


class LowerAttentionToOrt(Pass):
    """Attention with KV cache.

    Args:
        max_position_embeddings: Rows of the rotary tables: the longest sequence the model is meant for.
    """

    name = "lower-attention-to-ort"
    summary = "Attention -> GroupQueryAttention on a shared KV buffer"

    def __init__(self, max_position_embeddings: int = DEFAULT_MAX_POSITION) -> None:
        self.max_position_embeddings = max_position_embeddings

    def call(self, context: PassContext, result: PassResult) -> None:
        """Lower all attentions or none: the interface belongs to the whole graph."""
        graph = context.model.graph
        nodes = [n for n in graph if (n.domain, n.op_type) == (DOMAIN, "Attention")]
        result.matches = len(nodes)
        if not nodes or not _all_caches_are_attention(graph, nodes):
            if nodes:
                reason = "some KV cache tensors are not read by a fused Attention, so the cache stays as it is"
                result.rejected.append(Rejection("graph", self.name, reason))
            return
        heads = {_head_dim(node) for node in nodes}
        if None in heads:
            result.rejected.append(Rejection("graph", self.name, "the head dimension of the KV cache is not a number"))
            return
        tables, why = self._tables(nodes)
        result.detail["rotary"] = why or "inside the kernel, by tables"
        if context.prover is not None:
            for node in nodes:
                refusal, error = prove_lowered_attention(node, tables.get(_angles(node)), context.prover)
                if refusal:
                    result.rejected.append(Rejection(node_label(node), self.name, f"rolled back: {refusal}"))
                    return
                result.proved += 1
                result.max_error = max(result.max_error, error)
        inputs = _add_inputs(graph)
        for node in nodes:
            _lower(context, node, tables.get(_angles(node)), inputs)
            result.rewrites += 1
        _rename_cache_dims(graph)
        _widen_ids(graph)
        finish_rewrites(context)
        _drop_unused_inputs(graph)
        context.forget_analysis()

    def _tables(self, nodes: Sequence[ir.Node]) -> tuple[dict[tuple[ir.Value, ir.Value], RopeTable], str]:
        tables: dict[tuple[ir.Value, ir.Value], RopeTable] = {}
        odd = next((dim for dim in map(_head_dim, nodes) if dim is not None and dim % _ROTARY_MULTIPLE), None)
        if odd is not None:
            return {}, f"outside the kernel: it rotates heads of multiples of {_ROTARY_MULTIPLE}, these have {odd}"
        for cos, sin in dict.fromkeys(_angles(node) for node in nodes):
            table = tabulate(cos, sin, self.max_position_embeddings)
            if isinstance(table, str):
                return {}, f"outside the kernel: {table}"
            tables[cos, sin] = table
        return tables, ""


def _head_dim(node: ir.Node) -> int | None:
    past = node.inputs[3]
    dim = past.shape[3] if past is not None and past.shape is not None else None
    return dim if isinstance(dim, int) else None


def _angles(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    cos, sin = node.inputs[5], node.inputs[6]
    assert cos is not None
    assert sin is not None
    return cos, sin


def _all_caches_are_attention(graph: ir.Graph, nodes: Sequence[ir.Node]) -> bool:
    caches = {v for v in graph.inputs if (v.name or "").startswith("past_key_values.")}
    read = {v for n in nodes for v in n.inputs[3:5]}
    others = [user for v in caches for user, _ in v.uses() if user not in nodes]
    return caches == read and not others


def _add_inputs(graph: ir.Graph) -> list[ir.Value]:
    batch = next((v.shape[0] for v in graph.inputs if v.name == "input_ids" and v.shape is not None), None)
    seqlens = ir.Value(name="seqlens_k", type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape([batch]))
    total = ir.Value(name="total_sequence_length", type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape([]))
    position = next(i for i, v in enumerate(graph.inputs) if (v.name or "").startswith("past_key_values."))
    graph.inputs[position:position] = [seqlens, total]
    return [seqlens, total]


def _lower(context: PassContext, node: ir.Node, table: RopeTable | None, inputs: Sequence[ir.Value]) -> None:
    graph = context.model.graph
    dtype = node.inputs[3].dtype if node.inputs[3] is not None else None
    packed = _packed_qkv(node) if table is not None else None
    new_nodes: list[ir.Node] = []
    rows: list[ir.Value | None] = [packed, None, None] if packed is not None else list(node.inputs[:3])
    tables: list[ir.Value | None] = []
    if table is not None:
        tables = [
            _table_constant(graph, "rope.cos", table.cos, dtype),
            _table_constant(graph, "rope.sin", table.sin, dtype),
        ]
    else:
        rows[0] = _rotated(graph, node, 0, new_nodes)
        rows[1] = _rotated(graph, node, 1, new_nodes)
    attributes = {name: node.attributes[name] for name in ("num_heads", "kv_num_heads", "scale")}
    kernel = ir.Node(
        MICROSOFT,
        "GroupQueryAttention",
        [*rows, *node.inputs[3:5], *inputs, *tables],
        [*attributes.values(), ir.AttrInt64("do_rotary", 1 if table is not None else 0)],
        num_outputs=3,
        name=node.name,
    )
    new_nodes.append(kernel)
    for old, new in zip(node.outputs, kernel.outputs, strict=True):
        new.type, new.shape = old.type, old.shape
    ir.convenience.replace_nodes_and_values(graph, node, [node], new_nodes, node.outputs, kernel.outputs)
    graph.opset_imports.setdefault(MICROSOFT, 1)


def _packed_qkv(node: ir.Node) -> ir.Value | None:
    """Return the packed projection when q, k and v are exactly its Split: the kernel takes it whole."""
    splits = {v.producer() if v is not None else None for v in node.inputs[:3]}
    split = next(iter(splits)) if len(splits) == 1 else None
    if split is None or split.op_type != "Split" or list(split.outputs) != list(node.inputs[:3]):
        return None
    return split.inputs[0]


def _table_constant(graph: ir.Graph, name: str, table: np.ndarray, dtype: ir.DataType | None) -> ir.Value:
    array = table.astype((dtype or ir.DataType.FLOAT).numpy())
    full_name = f"{name}.{table.shape[0]}x{table.shape[1]}"
    existing = graph.initializers.get(full_name)
    if existing is not None and existing.const_value is not None:
        if np.array_equal(existing.const_value.numpy(), array):
            return existing
        full_name += f".{len(graph.initializers)}"
    return named_constant(graph, full_name, array)


def _rotated(graph: ir.Graph, node: ir.Node, index: int, new_nodes: list[ir.Node]) -> ir.Value:
    """Rotate q or k [B, S, N*d] outside the kernel: rows [B, S, N, d] with angles [B, S, 1, d]."""
    heads = node.attributes["num_heads" if index == 0 else "kv_num_heads"].as_int()
    shape = named_constant(graph, f"shape.0x0x{heads}xrest", np.array([0, 0, heads, -1], dtype=np.int64))
    flat = named_constant(graph, "shape.0x0xrest", np.array([0, 0, -1], dtype=np.int64))
    rows = ir.node("Reshape", [node.inputs[index], shape])
    angles = [ir.node("Transpose", [v], {"perm": [0, 2, 1, 3]}) for v in _angles(node)]
    rotary = ir.node("RotaryEmbedding", [rows.outputs[0], *(a.outputs[0] for a in angles)], domain=DOMAIN)
    joined = ir.node("Reshape", [rotary.outputs[0], flat])
    new_nodes.extend([rows, *angles, rotary, joined])
    for made in (rows, *angles, rotary, joined):
        made.name = f"{node.name}.{'q' if index == 0 else 'k'}.{made.op_type}_{len(new_nodes)}"
    return joined.outputs[0]


def _rename_cache_dims(graph: ir.Graph) -> None:
    """Past and present have the same length now: the buffer's."""
    for value in (*graph.inputs, *graph.outputs):
        if (value.name or "").startswith(("past_key_values.", "present.")) and value.shape is not None:
            dims = list(value.shape)
            value.shape = ir.Shape([dims[0], dims[1], "max_sequence_length", dims[3]])


def _widen_ids(graph: ir.Graph) -> None:
    """Token ids and positions are int64 in this interface; a graph that wants int32 gets a Cast."""
    for value in graph.inputs:
        if value.name in {"input_ids", "position_ids"} and value.dtype == ir.DataType.INT32:
            cast = ir.node("Cast", [value], {"to": int(ir.DataType.INT32)}, name=f"{value.name}.int32")
            cast.outputs[0].type, cast.outputs[0].shape = value.type, value.shape
            for user, index in [use for use in value.uses() if use.node is not cast]:
                user.replace_input_with(index, cast.outputs[0])
            value.type = ir.TensorType(ir.DataType.INT64)
            graph.insert_before(graph[0], cast)


def _drop_unused_inputs(graph: ir.Graph) -> None:
    for value in list(graph.inputs):
        if value.name in {"attention_mask", "position_ids"} and not value.uses():
            graph.inputs.remove(value)
