"""Remove what no output depends on, what is stored twice, and what does nothing. Nothing here changes a bit."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as ir_passes

from qcompile.passes.base import Pass, PassContext, PassResult
from qcompile.passes.change import register_functions

# Initializers above this size are compared by content hash only when dtype and shape already agree.
_MAX_COMPARED_BYTES = 1 << 20


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


class DeduplicateInitializers(Pass):
    """Equal constants stored twice; large weights are compared only when they are the same bytes of the same file."""

    name = "deduplicate-initializers"
    summary = "equal constants stored twice"

    def call(self, context: PassContext, result: PassResult) -> None:
        """Point every user of a duplicate to its first copy."""
        graph = context.model.graph
        seen: dict[tuple[object, ...], ir.Value] = {}
        for value in list(graph.initializers.values()):
            key = _identity(value)
            if key is None or value.is_graph_output():
                continue
            first = seen.setdefault(key, value)
            if first is value:
                continue
            ir.convenience.replace_all_uses_with(value, first)
            del graph.initializers[value.name or ""]
            result.rewrites += 1
        result.matches = result.rewrites


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


def _identity(value: ir.Value) -> tuple[object, ...] | None:
    """What makes two constants the same: dtype, shape and bytes, or for large ones their place in a file."""
    tensor = value.const_value
    if tensor is None or tensor.dtype == ir.DataType.STRING:
        return None
    head = (tensor.dtype, tuple(tensor.shape.numpy()))
    if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes > _MAX_COMPARED_BYTES:
        return (*head, str(tensor.path), tensor.offset)
    if tensor.nbytes > _MAX_COMPARED_BYTES or isinstance(tensor, ir.LazyTensor):
        return None
    return (*head, tensor.tobytes())


def _remove_unused_initializers(graph: ir.Graph) -> None:
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and value not in graph.inputs:
            del graph.initializers[name]
