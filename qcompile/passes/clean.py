"""Remove what no output depends on, what is computed twice, and what does nothing. Nothing here changes a bit."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as ir_passes

from qcompile.passes.base import Pass, PassContext, PassResult, Rejection
from qcompile.passes.change import register_functions
from qcompile.passes.matching import node_label


class EliminateDeadCode(Pass):
    """Nodes, initializers, functions and operator-set imports that no output needs."""

    name = "eliminate-dead-code"
    summary = "nodes and weights that no output needs"

    def call(self, context: PassContext, result: PassResult) -> None:
        """Count and remove."""
        graph = context.model.graph
        before = len(graph) + len(graph.initializers)
        ir_passes.RemoveUnusedNodesPass()(context.model)
        _remove_unused_initializers(graph)
        register_functions(context.model)
        ir_passes.RemoveUnusedOpsetsPass()(context.model)
        result.rewrites = result.matches = before - len(graph) - len(graph.initializers)


class EliminateCommonSubexpressions(Pass):
    """Nodes that compute the same from the same inputs; a graph that flips coins is left alone."""

    name = "eliminate-common-subexpressions"
    summary = "nodes that compute the same thing twice"

    def call(self, context: PassContext, result: PassResult) -> None:
        """Merge and count; onnx-ir's pass knows every random operator but one."""
        graph = context.model.graph
        coin = next((n for n in graph.all_nodes() if n.op_type == "Bernoulli"), None)
        if coin is not None:
            result.rejected.append(Rejection(node_label(coin), self.name, "Bernoulli draws anew each time"))
            return
        before = len(graph)
        ir_passes.CommonSubexpressionEliminationPass()(context.model)
        result.rewrites = result.matches = before - len(graph)


class EliminateIdentities(Pass):
    """Identity nodes, but for those that give an input, a weight or an output of the graph a second name."""

    name = "eliminate-identities"
    summary = "Identity nodes"

    def call(self, context: PassContext, result: PassResult) -> None:
        """Let the readers of each Identity read its input; an output's name moves to what computes it."""
        for node in list(context.model.graph.all_nodes()):
            value, output = (node.inputs[0], node.outputs[0]) if node.op_type == "Identity" else (None, None)
            if value is None or output is None or node.graph is None or node.domain != "":
                continue
            producer = value.producer()
            if output.is_graph_output():
                if producer is None or producer.graph is not node.graph or value.is_graph_output():
                    continue
                value.name = output.name
            value.type = value.type if value.type is not None else output.type
            value.shape = value.shape if value.shape is not None else output.shape
            ir.convenience.replace_all_uses_with(output, value, replace_graph_outputs=True)
            node.graph.remove(node, safe=True)
            result.rewrites += 1
        result.matches = result.rewrites


class LiftConstants(Pass):
    """Constant nodes become initializers, and initializers are no inputs: one spelling of a constant."""

    name = "lift-constants"
    summary = "Constant nodes -> initializers"

    def call(self, context: PassContext, result: PassResult) -> None:
        """Lift every Constant node, scalars too; drop the inputs that only name an initializer."""
        before = _num_constants(context.model.graph)
        ir_passes.RemoveInitializersFromInputsPass()(context.model)
        ir_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(context.model)
        result.matches, result.rewrites = before, before - _num_constants(context.model.graph)


def _num_constants(graph: ir.Graph) -> int:
    """Constants in another spelling than an initializer alone."""
    inputs = sum(v.const_value is not None for v in graph.inputs)
    return inputs + sum((n.domain, n.op_type) == ("", "Constant") for n in graph)


def _remove_unused_initializers(graph: ir.Graph) -> None:
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and value not in graph.inputs:
            del graph.initializers[name]
