"""Read dimensions off the graph's inputs instead of off activations.

    Shape(activation)  ->  Concat(Shape(input_ids)[0], 14, Shape(attention_mask)[1], 64)

Exporters ask an activation deep in a layer for its batch size or its key length, often to slice the mask. Such a reader
would keep half a layer alive when the layer is fused. A dimension is replaced by an input's dimension, or by a number,
that agrees with it in every case; where one cannot be, the Shape stays.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.passes.base import Pass, PassContext, PassResult
from qcompile.passes.change import Change, apply_change, finish_rewrites, named_constant
from qcompile.passes.proof import Rewrite


class RootShapes(Pass):
    """Shape of activations."""

    name = "root-shapes"
    summary = "Shape(activation) -> Shape(input)"

    def call(self, context: PassContext, result: PassResult) -> None:
        """Rewrite every Shape whose operand is computed."""
        inputs = set(context.model.graph.inputs)
        for node in list(context.model.graph):
            if node.op_type != "Shape" or node.inputs[0] is None or node.inputs[0] in inputs:
                continue
            if node.outputs[0].is_graph_output():
                continue
            result.matches += 1
            new_nodes = _from_inputs(node, context)
            if new_nodes:
                outputs = new_nodes[-1].outputs
                apply_change(
                    context, result, Change("root-shapes", node, Rewrite([node], node.outputs, new_nodes, outputs))
                )
        if result.rewrites:
            finish_rewrites(context)


def _from_inputs(node: ir.Node, context: PassContext) -> list[ir.Node]:
    """Return the nodes that rebuild the shape from graph inputs, the last one giving it; empty when impossible."""
    sizes = context.analysis.values(node.outputs[0])
    if sizes is None or sizes[0].size == 0:
        return []
    nodes: list[ir.Node] = []
    parts: list[ir.Value] = []
    for axis in range(sizes[0].size):
        seen = [int(s[axis]) for s in sizes]
        if len(set(seen)) == 1:
            parts.append(named_constant(context.model.graph, f"dim.{seen[0]}", np.array(seen[:1], dtype=np.int64)))
            continue
        found = _input_dim(seen, context)
        if found is None:
            return []
        value, input_axis = found
        shape = ir.node("Shape", [value], {"start": input_axis, "end": input_axis + 1})
        nodes.append(shape)
        parts.append(shape.outputs[0])
    nodes.append(ir.node("Concat", parts, {"axis": 0}))
    return nodes


def _input_dim(seen: list[int], context: PassContext) -> tuple[ir.Value, int] | None:
    """Find the first graph input with a dimension of these sizes in all cases."""
    for value in context.model.graph.inputs:
        specs = context.analysis.specs(value)
        if specs is None:
            continue
        for axis in range(len(specs[0].shape)):
            if [spec.shape[axis] for spec in specs] == seen:
                return value, axis
    return None
