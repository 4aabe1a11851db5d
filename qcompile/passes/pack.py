"""Pack projections that read the same input into one: what fuse-qkv and fuse-gate-up share.

    y_1 = x @ W_1 [+ b_1], y_2 = x @ W_2 [+ b_2], …   ->   y_1, y_2, … = Split(x @ [W_1 | W_2 | …] [+ [b_1 | b_2 | …]])

The packed weight is concatenated row by row while the model is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from qcompile.functions import DOMAIN
from qcompile.passes.base import PassContext, PassResult, Rejection
from qcompile.passes.change import Change, apply_change, named_constant, node_label, shared_prefix
from qcompile.passes.proof import Rewrite
from qcompile.passes.rule import is_weight
from qcompile.weights import concat_columns

Combine = Callable[[Sequence[ir.TensorProtocol]], ir.TensorProtocol]


def is_projection(node: ir.Node | None) -> bool:
    """Whether a node is MatMul or Linear by a weight [M, N]."""
    if node is None or (node.domain, node.op_type) not in {("", "MatMul"), (DOMAIN, "Linear")}:
        return False
    weight = node.inputs[1]
    return weight is not None and is_weight(weight) and len(weight.const_value.shape) == 2  # type: ignore[union-attr]


def obstacle(nodes: Sequence[ir.Node]) -> str:
    """Return why projections of one input cannot be packed; empty when they can."""
    if len({(n.domain, n.op_type) for n in nodes}) != 1:
        return "some projections have a bias and some have none"
    weights = [n.inputs[1] for n in nodes]
    if len({w.const_value.dtype for w in weights if w is not None and w.const_value is not None}) != 1:
        return "the weights differ in dtype"
    shared = [w.name for w in weights if w is not None and len(w.uses()) > 1]
    if shared:
        return f"weight '{shared[0]}' is used elsewhere too: packing would store it twice"
    if any(v.is_graph_output() for n in nodes for v in n.outputs):
        return "a projection is an output of the graph"
    return ""


def pack(context: PassContext, result: PassResult, rule: str, nodes: Sequence[ir.Node], label: str) -> bool:
    """Replace projections of one input by one projection and a Split; count and prove like any rewrite.

    Args:
        context: Model and prover.
        result: Where matches, rewrites and rejections are counted.
        rule: Name for the report.
        nodes: The projections, in the order of the packed columns.
        label: Last part of the new node's name, such as `qkv_proj`.
    """
    result.matches += 1
    reason = obstacle(nodes)
    if reason:
        result.rejected.append(Rejection(node_label(nodes[0]), rule, reason))
        return False
    name = ".".join(part for part in (shared_prefix([n.name or "" for n in nodes]), label) if part)
    weight = _packed(name + ".weight", [n.inputs[1] for n in nodes], concat_columns)
    inputs, initializers = [nodes[0].inputs[0], weight], [weight]
    if nodes[0].op_type == "Linear":
        bias = _packed(name + ".bias", [n.inputs[2] for n in nodes], _concat_vectors)
        inputs.append(bias)
        initializers.append(bias)
    first = nodes[0]
    projection = ir.node(first.op_type, inputs, domain=first.domain, name=name)
    widths = [int(n.inputs[1].const_value.shape[1]) for n in nodes]  # type: ignore[union-attr,arg-type]
    sizes_name = "split." + "x".join(map(str, widths))
    sizes = named_constant(context.model.graph, sizes_name, np.array(widths, dtype=np.int64))
    split = ir.node("Split", [projection.outputs[0], sizes], {"axis": -1}, num_outputs=len(nodes))
    rewrite = Rewrite(nodes, [n.outputs[0] for n in nodes], [projection, split], split.outputs)
    root = max(nodes, key=list(context.model.graph).index)
    return apply_change(context, result, Change(rule, root, rewrite, initializers, names=(name, f"{name}.split")))


def _packed(name: str, values: Sequence[ir.Value | None], combine: Combine) -> ir.Value:
    tensor = combine([v.const_value for v in values if v is not None and v.const_value is not None])
    tensor.name = name
    return ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
    )


def _concat_vectors(tensors: Sequence[ir.TensorProtocol]) -> ir.TensorProtocol:
    return ir.tensor(np.concatenate([t.numpy() for t in tensors]))
