"""Remove what no output depends on, what is computed twice, and what does nothing. Nothing here changes a bit."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as ir_passes

from qcompile.passes.base import Pass, PassContext, PassResult
from qcompile.passes.change import register_functions


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


class _Counting(Pass):
    """A pass that delegates to onnx-ir's and counts the nodes and initializers that went."""

    delegates: ClassVar[tuple[type[ir.passes.InPlacePass], ...]]

    def call(self, context: PassContext, result: PassResult) -> None:
        """Run the delegates in order."""
        graph = context.model.graph
        before = len(graph) + len(graph.initializers)
        for delegate in self.delegates:
            delegate()(context.model)
        gone = before - len(graph) - len(graph.initializers)
        result.rewrites = result.matches = max(gone, 0)


class EliminateCommonSubexpressions(_Counting):
    """Nodes that compute the same from the same inputs."""

    name = "eliminate-common-subexpressions"
    summary = "nodes that compute the same thing twice"
    delegates = (ir_passes.CommonSubexpressionEliminationPass,)


class EliminateIdentities(_Counting):
    """Identity nodes."""

    name = "eliminate-identities"
    summary = "Identity nodes"
    delegates = (ir_passes.IdentityEliminationPass,)


class LiftConstants(Pass):
    """Constant nodes become initializers: one spelling of a constant."""

    name = "lift-constants"
    summary = "Constant nodes -> initializers"

    def call(self, context: PassContext, result: PassResult) -> None:
        """Lift every Constant node, scalars too."""
        before = sum(n.op_type == "Constant" for n in context.model.graph)
        ir_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(context.model)
        result.rewrites = before - sum(n.op_type == "Constant" for n in context.model.graph)
        result.matches = before


def _remove_unused_initializers(graph: ir.Graph) -> None:
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and value not in graph.inputs:
            del graph.initializers[name]
