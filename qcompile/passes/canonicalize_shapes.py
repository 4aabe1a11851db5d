"""Shape bookkeeping in one spelling, whatever chain of Shape, Gather and Concat an exporter computed it with.

    Reshape(x, computed shape)                   -> Reshape(x, [0, 0, H, d])    0 copies a dim, -1 takes the rest
    Expand(x, shape), Reshape(x), Cast(x), ...   -> x                           where shape and dtype stay the same
    Mul(Expand(x, shape), y)                     -> Mul(x, y)                   where y broadcasts x anyway
    Cast(Cast(x, float32), float16)              -> x                           x: float16
    Reshape(Reshape(x))                          -> one Reshape, or x
    Transpose(Transpose(x))                      -> one Transpose, or x
    Reshape(Transpose(Reshape(x, [-1,T,d])))     -> Transpose(x, [0,1,3,2])     how torch swaps the last two axes

The new target is read off the concrete cases and then proved like every rewrite.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompile.analysis import Spec
from qcompile.passes.base import Pass, PassContext, PassResult
from qcompile.passes.change import Change, apply_change, detach, finish_rewrites, named_constant
from qcompile.passes.proof import Rewrite

_EXACT_CASTS = {
    (ir.DataType.FLOAT16, ir.DataType.FLOAT),
    (ir.DataType.BFLOAT16, ir.DataType.FLOAT),
    (ir.DataType.FLOAT16, ir.DataType.DOUBLE),
    (ir.DataType.BFLOAT16, ir.DataType.DOUBLE),
    (ir.DataType.FLOAT, ir.DataType.DOUBLE),
    (ir.DataType.INT32, ir.DataType.INT64),
}
# Control values (masks, angles) vanish with the fusions that read them; only what stays beside the fusions is tidied.
_FOR_CONTROL_TOO = {"Cast", "Expand", "Concat"}
_BROADCASTING = {"Add", "Sub", "Mul", "Div", "MatMul", "And", "Or", "Where", "Min", "Max", "Equal", "Less", "Greater"}
_NO_OP_CANDIDATES = {
    "Concat",
    "Reshape",
    "Expand",
    "Cast",
    "Identity",
    "Transpose",
    "Slice",
    "Unsqueeze",
    "Squeeze",
    "Flatten",
}


class CanonicalizeShapes(Pass):
    """Reshape, Expand, Transpose and Cast bookkeeping."""

    name = "canonicalize-shapes"
    summary = "computed Reshape targets -> constants; no-op Reshape, Expand, Transpose, Cast removed"

    def call(self, context: PassContext, result: PassResult) -> None:
        """One sweep in topological order."""
        for node in list(context.model.graph):
            if node.graph is None or node.domain != "" or node.op_type not in _NO_OP_CANDIDATES:
                continue
            for change in _changes(node, context):
                apply_change(context, result, change)
        result.matches = result.rewrites + len(result.rejected)
        if result.rewrites:
            finish_rewrites(context)


def _changes(node: ir.Node, context: PassContext) -> list[Change]:
    """Return what can be done with one node: one change, or one for each reader of an Expand."""
    if node.op_type not in _FOR_CONTROL_TOO and context.analysis.values(node.outputs[0]) is not None:
        return []
    if node.op_type == "Concat" and len(node.inputs) > 1:
        return []
    change = _bypass(node, context) or _cast_round_trip(node, context)
    change = change or _swap_last_axes(node, context) or _merge(node, context)
    change = change or _constant_target(node, context)
    return [change] if change is not None else _broadcast_anyway(node, context)


def target_template(source: Sequence[Spec], target: Sequence[Spec]) -> list[int] | None:
    """Return a constant Reshape target that gives the `target` shapes from the `source` shapes in every case.

    Each entry is a number, 0 (copy the dim of the same index) or, at most once, -1. None when there is no such target.
    """
    template: list[int] = []
    for axis in range(len(target[0].shape)):
        sizes = [spec.shape[axis] for spec in target]
        if len(set(sizes)) == 1 and sizes[0] > 0:
            template.append(sizes[0])
        elif all(axis < len(s.shape) and s.shape[axis] == size for s, size in zip(source, sizes, strict=True)):
            template.append(0)
        elif -1 not in template:
            template.append(-1)
        else:
            return None
    return template


def _bypass(node: ir.Node, context: PassContext) -> Change | None:
    """The node changes neither shape nor dtype nor order: use its input."""
    value, output = node.inputs[0], node.outputs[0]
    if value is None or output.is_graph_output():
        return None
    if not _same_shape(value, output, context):
        return None
    if node.op_type == "Transpose" and _permutation(node) != sorted(_permutation(node)):
        return None
    # An Identity stands for "nothing", so that the proof has something to run; eliminate-identities removes it.
    if node.op_type == "Identity":
        return None
    identity = ir.node("Identity", [value])
    return Change("bypass", node, Rewrite([node], [output], [identity], identity.outputs))


def _cast_round_trip(node: ir.Node, context: PassContext) -> Change | None:
    """A Cast to a wider float type and back: the value itself."""
    inner = _producer(node.inputs[0], "Cast") if node.op_type == "Cast" else None
    value, output = inner.inputs[0] if inner is not None else None, node.outputs[0]
    if inner is None or value is None or output.is_graph_output() or not _same_shape(value, output, context):
        return None
    narrow, wide = context.analysis.spec(value, 0), context.analysis.spec(inner.outputs[0], 0)
    if narrow is None or wide is None or (narrow.dtype, wide.dtype) not in _EXACT_CASTS:
        return None
    return _private_change("cast-round-trip", [node, inner], ir.node("Identity", [value]))


def _broadcast_anyway(node: ir.Node, context: PassContext) -> list[Change]:
    """Expand in front of operators that broadcast to the same shape: they read what is expanded."""
    value, output = node.inputs[0], node.outputs[0]
    readers = list(dict.fromkeys(reader for reader, _ in output.uses()))
    if node.op_type != "Expand" or value is None or output.is_graph_output() or not readers:
        return []
    changes = []
    for reader in readers:
        if reader.domain != "" or reader.op_type not in _BROADCASTING or reader.graph is not node.graph:
            continue
        inputs = [value if v is output else v for v in reader.inputs]
        copy = ir.node(reader.op_type, inputs, dict(reader.attributes))
        context.analysis.update([copy])
        if not _same_shape(copy.outputs[0], reader.outputs[0], context):
            detach([copy])
            continue
        rewrite = Rewrite([node, reader], [reader.outputs[0]], [copy], copy.outputs)
        changes.append(Change("broadcast-anyway", reader, rewrite, kept=(node,), names=(reader.name or "",)))
    return changes


def _same_shape(value: ir.Value, output: ir.Value, context: PassContext) -> bool:
    before, after = context.analysis.specs(value), context.analysis.specs(output)
    if before is None or after is None:
        return False
    return all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(before, after, strict=True))


def _swap_last_axes(node: ir.Node, context: PassContext) -> Change | None:
    """Reshape(Transpose(Reshape(x, [B*H, T, d]), [0, 2, 1]), [B, H, d, T]) -> Transpose(x as [B, H, T, d], [0, 1, 3, 2])."""
    transpose = _producer(node.inputs[0], "Transpose") if node.op_type == "Reshape" else None
    inner = _producer(transpose.inputs[0], "Reshape") if transpose is not None else None
    if transpose is None or inner is None or _permutation(transpose) != [0, 2, 1]:
        return None
    value = inner.inputs[0]
    before = context.analysis.specs(value) if value is not None else None
    after = context.analysis.specs(node.outputs[0])
    flat = context.analysis.specs(inner.outputs[0])
    if value is None or before is None or after is None or flat is None or len(after[0].shape) != 4:
        return None
    heads = [Spec(s.dtype, (*s.shape[:2], s.shape[3], s.shape[2])) for s in after]
    if any(a.shape[2:] != b.shape[1:] for a, b in zip(heads, flat, strict=True)):
        return None
    new_nodes: list[ir.Node] = []
    if any(a.shape != b.shape for a, b in zip(before, heads, strict=True)):
        template = target_template(before, heads)
        if template is None:
            return None
        new_nodes.append(ir.node("Reshape", [value, shape_constant(context.model.graph, template)]))
        value = new_nodes[0].outputs[0]
    new_nodes.append(ir.node("Transpose", [value], {"perm": [0, 1, 3, 2]}))
    return _private_change("swap-last-axes", [node, transpose, inner], *new_nodes)


def _merge(node: ir.Node, context: PassContext) -> Change | None:
    """Two Reshapes, or two Transposes, in a row: one."""
    inner = _producer(node.inputs[0], node.op_type) if node.op_type in {"Reshape", "Transpose"} else None
    if inner is None or inner.inputs[0] is None:
        return None
    value = inner.inputs[0]
    if node.op_type == "Transpose":
        first, second = _permutation(inner), _permutation(node)
        perm = [first[axis] for axis in second]
        is_nothing = perm == sorted(perm) and not node.outputs[0].is_graph_output()
        merged = ir.node("Identity", [value]) if is_nothing else ir.node("Transpose", [value], {"perm": perm})
        return _private_change("merge-transposes", [node, inner], merged)
    return _reshape_to(value, [node, inner], "merge-reshapes", context)


def _constant_target(node: ir.Node, context: PassContext) -> Change | None:
    """A Reshape whose target is computed, or constant but not in the canonical spelling."""
    if node.op_type != "Reshape" or node.inputs[0] is None:
        return None
    template = _template(node.inputs[0], node.outputs[0], context)
    current = node.inputs[1].const_value if len(node.inputs) > 1 and node.inputs[1] is not None else None
    allow_zero = node.attributes.get("allowzero")
    copies_zero = allow_zero is None or not allow_zero.as_int()
    if template is None or (current is not None and copies_zero and current.numpy().tolist() == template):
        return None
    return _reshape_to(node.inputs[0], [node], "constant-target", context)


def _template(value: ir.Value, output: ir.Value, context: PassContext) -> list[int] | None:
    source, target = context.analysis.specs(value), context.analysis.specs(output)
    return None if source is None or target is None else target_template(source, target)


def _reshape_to(value: ir.Value, old_nodes: list[ir.Node], rule: str, context: PassContext) -> Change | None:
    output = old_nodes[0].outputs[0]
    template = _template(value, output, context)
    if template is None:
        return None
    if _same_shape(value, output, context) and not output.is_graph_output():
        identity = ir.node("Identity", [value])
        return _private_change(rule, old_nodes, identity)
    shape = shape_constant(context.model.graph, template)
    reshape = ir.node("Reshape", [value, shape])
    return _private_change(rule, old_nodes, reshape)


def shape_constant(graph: ir.Graph, target: Sequence[int]) -> ir.Value:
    """Return the graph's int64 constant with these numbers, made on first use."""
    name = "shape." + "x".join(str(n) if n >= 0 else "rest" for n in target)
    return named_constant(graph, name, np.array(target, dtype=np.int64))


def _private_change(rule: str, old_nodes: list[ir.Node], *new_nodes: ir.Node) -> Change:
    """A change that replaces the first of `old_nodes` and drops the others when nobody else reads them."""
    root = old_nodes[0]
    gone, last = [root], root
    for node in old_nodes[1:]:
        if any(user is not last for user, _ in node.outputs[0].uses()) or node.outputs[0].is_graph_output():
            break
        gone.append(node)
        last = node
    # The proof compares whole chains even when an inner node stays because others read it.
    return Change(
        rule,
        root,
        Rewrite(old_nodes, [root.outputs[0]], new_nodes, new_nodes[-1].outputs),
        kept=tuple(old_nodes[len(gone) :]),
    )


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type and node.domain == "" else None


def _permutation(node: ir.Node) -> list[int]:
    perm = node.attributes.get("perm")
    if perm is not None:
        return list(perm.as_ints())
    rank = len(node.inputs[0].shape or ()) if node.inputs[0] is not None else 0
    return list(range(rank))[::-1]
