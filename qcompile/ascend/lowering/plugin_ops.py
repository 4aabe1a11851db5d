"""Put the operators of parser plugins into a lowered graph: fused kernels that CANN has and its own parsers do not reach.

    SwiGlu                    split(x) -> sigmoid(gate) * gate * up                       one kernel in place of four
    ApplyRotaryPosEmb         q and k turned together; where they lie side by side it saves the split behind
    FusedInferAttentionScore  in place of NPUPromptFlashAttention, without its tensor of zeros

RmsNorm with the model's own epsilon is chosen while walking (`norms.py`). Nothing of this was built or run on a device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.ascend.chips import Chip
from qcompile.ascend.lowering.static_graph import Dims, dims
from qcompile.ascend.plugins import METADATA_KEY, PLUGINS

# The head size that every release of ApplyRotaryPosEmb takes; newer ones take others.
ROTARY_DIM = 128
_UB_BYTES = 196608


def use_plugins(model: ir.Model, plugins: frozenset[str], chip: Chip) -> dict[str, int]:
    """Rewrite a lowered graph in place.

    Args:
        model: The graph.
        plugins: Which are installed where ATC runs.
        chip: The chip.

    Returns:
        Why a plugin was not used, with how often.
    """
    graph, reasons = model.graph, dict[str, int]()
    for node in list(graph):
        reason = ""
        if node.op_type == "Mul" and "swiglu" in plugins:
            reason = _swiglu(graph, node, chip)
        elif node.op_type == "NPURotaryMul" and "rotary" in plugins:
            reason = _rotary(graph, node, chip)
        elif node.op_type == "NPUPromptFlashAttention" and "attention" in plugins:
            _attention(graph, node)
        if reason:
            reasons[reason] = reasons.get(reason, 0) + 1
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        graph.initializers.pop(name)
    found = {node.op_type for node in graph}
    used = [name for name, op_type in PLUGINS.items() if op_type in found]
    if used:
        model.metadata_props[METADATA_KEY] = ",".join(used)
    return reasons


def _swiglu(graph: ir.Graph, node: ir.Node, chip: Chip) -> str:
    """Rewrite y = (gate * sigmoid(gate)) * up; `node` is the outer Mul."""
    silu, up = (value.producer() if value is not None else None for value in node.inputs)
    if silu is None or silu.op_type != "Mul" or silu.inputs[1] is None or silu.inputs[0] is None:
        return ""
    gate, sigmoid = silu.inputs[0], silu.inputs[1].producer()
    if sigmoid is None or sigmoid.op_type != "Sigmoid" or sigmoid.inputs[0] is not gate:
        return ""
    if chip.family == "310B":
        return "SwiGlu: the 310B has no such kernel"
    split = gate.producer()
    if (
        split is None
        or split is not up
        or list(split.outputs) != [gate, node.inputs[1]]
        or dims(gate) != dims(node.outputs[0])
    ):
        return "SwiGlu: gate and up are not the halves of one product"
    x = split.inputs[0]
    assert x is not None
    _replace(graph, node, [x], {"dim": -1}, "NPUSwiGlu")
    _drop(graph, silu, sigmoid, split)
    return ""


def _rotary(graph: ir.Graph, node: ir.Node, chip: Chip) -> str:
    """Turn q and k by one node: where they lie side by side they are split first, not after."""
    turned = node.outputs[0]
    readers = [user for user, _ in turned.uses()]
    if len(readers) == 1 and readers[0].op_type == "Split" and len(readers[0].outputs) == 2:
        return _rotary_of_one_value(graph, node, readers[0], chip)
    other = {n.name: n for n in graph if n.op_type == "NPURotaryMul"}.get((node.name or "").replace(".k_", ".q_"))
    if other is None or other is node:
        return ""  # that of q: done with that of k
    if list(other.inputs[1:]) != list(node.inputs[1:]):
        return "ApplyRotaryPosEmb: q and k have different angles"
    q, k = other.inputs[0], node.inputs[0]
    assert q is not None
    assert k is not None
    reason = _why_no_rotary(dims(q), dims(k), node, chip)
    if not reason:
        _turn(graph, node, (q, k), (other.outputs[0], turned))
        _drop(graph, node, other)
    return reason


def _rotary_of_one_value(graph: ir.Graph, node: ir.Node, halves: ir.Node, chip: Chip) -> str:
    """Rewrite split(packed) -> [q | k] rows -> rotation -> split to split(packed) -> q, k -> one rotation."""
    rows = node.inputs[0].producer() if node.inputs[0] is not None else None
    columns = rows.inputs[0].producer() if rows is not None and rows.inputs[0] is not None else None
    if rows is None or rows.op_type != "Reshape" or columns is None or columns.op_type != "Split":
        return "ApplyRotaryPosEmb: something stands between the product and the rotation"
    q_rows, k_rows = (dims(value) for value in halves.outputs)
    reason = _why_no_rotary(q_rows, k_rows, node, chip)
    if reason:
        return reason
    packed, old_v = columns.inputs[0], columns.outputs[1]
    b, s, d = q_rows[0], q_rows[1], q_rows[3]
    widths = [q_rows[2] * d, k_rows[2] * d, dims(old_v)[2]]
    sizes = _ints(graph, widths)
    split = ir.node("Split", [packed, sizes], {"axis": 2}, num_outputs=3, name=f"{node.name}.q_k_v")
    parts = []
    for value, width, letter in zip(split.outputs, widths, "qkv", strict=True):
        value.name, value.type, value.shape = f"{split.name}.{letter}", old_v.type, ir.Shape((b, s, width))
    reshapes = []
    for value, shape, letter in zip(split.outputs[:2], (q_rows, k_rows), "qk", strict=True):
        reshape = ir.node("Reshape", [value, _ints(graph, shape)], name=f"{node.name}.{letter}_rows")
        made = reshape.outputs[0]
        made.name, made.type, made.shape = reshape.name, old_v.type, ir.Shape(shape)
        reshapes.append(reshape)
        parts.append(made)
    graph.insert_before(columns, split)
    ir.convenience.replace_all_uses_with(old_v, split.outputs[2])
    graph.insert_before(node, reshapes)
    _turn(graph, node, (parts[0], parts[1]), (halves.outputs[0], halves.outputs[1]))
    _drop(graph, halves, node, rows, columns)
    return ""


def _turn(graph: ir.Graph, node: ir.Node, rows: tuple[ir.Value, ir.Value], old: tuple[ir.Value, ir.Value]) -> None:
    """Append one rotation of both rows behind `node`, with its angles, in the place of the old values."""
    inputs = [*rows, *node.inputs[1:]]
    both = ir.node("NPUApplyRotaryPosEmb", inputs, {"layout": 1}, num_outputs=2, name=f"{node.name}.both")
    for new, value in zip(both.outputs, old, strict=True):
        _take_place(value, new)
    graph.insert_after(node, both)


def _why_no_rotary(q_rows: Dims, k_rows: Dims, node: ir.Node, chip: Chip) -> str:
    (_, _, num_q, d), num_k, cos = q_rows, k_rows[2], node.inputs[1]
    assert cos is not None
    is_bf16 = node.outputs[0].dtype == ir.DataType.BFLOAT16
    size = 4 if is_bf16 else 2
    needed = (num_q + num_k) * d * size * 5 + d * 2 * 4 + is_bf16 * d * 8  # as its documentation counts
    reason = ""
    if chip.family == "310B":
        reason = "the 310B has no such kernel"
    elif d != ROTARY_DIM:
        reason = f"heads of {d}; {ROTARY_DIM} is what every release takes"
    elif dims(cos)[2] != 1:
        reason = "every head has angles of its own"
    elif needed > _UB_BYTES:
        reason = f"{num_q + num_k} heads of {d} want {needed} bytes of the unified buffer, there are {_UB_BYTES}"
    return f"ApplyRotaryPosEmb: {reason}" if reason else ""


def _attention(graph: ir.Graph, node: ir.Node) -> None:
    """Make NPUPromptFlashAttention the kernel that has decode steps too; its zeros in the place of pse_shift go."""
    query, key, value, _, mask = node.inputs
    assert query is not None
    one_token = dims(query)[2] == 1
    attributes = {
        "num_heads": node.attributes["num_heads"].as_int(),
        "num_key_value_heads": node.attributes["num_key_value_heads"].as_int(),
        "scale": node.attributes["scale_value"].as_float(),
        # for one token the two layouts are the same numbers, and BNSD_BSND asks for more than one
        "input_layout": "BNSD" if one_token else "BNSD_BSND",
        "sparse_mode": 0,
        "inner_precise": 0,
    }
    new = _replace(graph, node, [query, key, value, mask], attributes, "NPUFusedInferAttentionScore")
    if one_token:
        new.outputs[0].shape = ir.Shape(dims(query))


def _replace(
    graph: ir.Graph, node: ir.Node, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any], op_type: str
) -> ir.Node:
    """Put a node of one output in the place of another, under its name."""
    new = ir.node(op_type, inputs, attributes, name=node.name)
    _take_place(node.outputs[0], new.outputs[0])
    graph.insert_after(node, new)
    graph.remove(node, safe=True)
    return new


def _take_place(old: ir.Value, new: ir.Value) -> None:
    name, new.type, new.shape = old.name, old.type, old.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    old.name, new.name = f"{name}.replaced", name


def _drop(graph: ir.Graph, *nodes: ir.Node) -> None:
    """Remove nodes that nobody reads any more, readers first."""
    for node in nodes:
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)


def _ints(graph: ir.Graph, numbers: Sequence[int]) -> ir.Value:
    """Return an int64 constant, named as `StaticGraph.ints` names it."""
    name = f"const.{'x'.join(map(str, numbers))}"
    if name not in graph.initializers:
        tensor = ir.Tensor(np.array(numbers, dtype=np.int64), name=name)
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
        )
        graph.register_initializer(value)
    return graph.initializers[name]
