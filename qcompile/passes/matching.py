"""Match a rule's pattern at a node, and say in words how far it went and what was in the way.

onnxscript's matcher does the work. On top of it: a pattern with several outputs is anchored at its first one (the
original tries every combination of nodes in the graph), a value that others read is named with its reader, and the
deepest failure is remembered instead of the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import _pattern_ir  # the classes of patterns are not public
from onnxscript.rewriter._basics import MatchResult
from onnxscript.rewriter._matcher import SimplePatternMatcher


@dataclass(frozen=True)
class NearMiss:
    """How far a pattern got at one root: the nodes that matched, and what did not."""

    nodes: tuple[ir.Node, ...]
    reason: str


class _WholeMatch(MatchResult):
    """A match that keeps the nodes and values of an alternative it takes over; the original forgets them."""

    def merge_current_match(self) -> None:
        """Take over the alternative that matched."""
        taken = self._partial_matches[-1]
        super().merge_current_match()
        self._partial_matches[-1].node_bindings.update(taken.node_bindings)
        self._partial_matches[-1].value_bindings.update(taken.value_bindings)


class Matcher(SimplePatternMatcher):
    """Matches from the first output of a pattern downwards."""

    deepest: NearMiss

    @property
    def root_op_type(self) -> str:
        """Operator type of the node at which the pattern is anchored."""
        return str(self._root().op_type)

    def match(
        self,
        model: ir.Model,
        graph_or_function: ir.Graph | ir.Function,
        node: ir.Node,
        *,
        verbose: int = 0,
        remove_nodes: bool = True,
        tracer: Any = None,
    ) -> MatchResult:
        """Match at one node; all other outputs of the pattern must lie below its first."""
        del model, tracer
        self._graph = graph_or_function if isinstance(graph_or_function, ir.Graph) else graph_or_function.graph
        self._init_match(verbose)
        self._match = _WholeMatch()
        self.deepest = NearMiss((), "")
        match: MatchResult = self._match
        if not self._match_node(self._root(), node):
            return match
        outputs = self._get_output_values()
        if outputs is None:
            return match
        reader = _outside_reader(match.nodes, outputs) if remove_nodes else ""
        if reader:
            self._remember(reader)
            return match.fail(reader)
        match.outputs.extend(outputs)
        return match

    def fail(self, reason: str, node: ir.Node | None = None) -> bool:
        """Record a failure; the deepest one is kept."""
        self._remember(reason)
        return bool(super().fail(reason, node))

    def _match_value(self, pattern_value: Any, value: ir.Value | None) -> bool:
        wanted = _wanted_op(pattern_value)
        producer = value.producer() if value is not None else None
        if wanted and (producer is None or producer.op_type != wanted):
            return self.fail(f"{_origin(value)}, wanted {wanted}")
        if super()._match_value(pattern_value, value):
            return True
        if "bound to two different values" in self._match.reason:
            name = getattr(pattern_value, "name", None) or "operand"
            self._remember(f"{_origin(value)}: not the same {name} as elsewhere in the pattern")
        return False

    def _root(self) -> Any:
        return self.pattern.outputs[0].producer()

    def _remember(self, reason: str) -> None:
        nodes = tuple(n for partial in self._match._partial_matches for n in partial.nodes)
        if len(nodes) > len(self.deepest.nodes) or not self.deepest.reason:
            self.deepest = NearMiss(nodes, reason)


def node_label(node: ir.Node) -> str:
    """A node's name for people: its own, else its first output's."""
    return node.name or (node.outputs[0].name or "?" if node.outputs else "?")


def _wanted_op(pattern_value: Any) -> str:
    """The operator type that a pattern demands of a value's producer; empty when it leaves a choice."""
    if not isinstance(pattern_value, _pattern_ir.NodeOutputPattern):
        return ""
    return str(pattern_value.producer().op_type)


def _origin(value: ir.Value | None) -> str:
    if value is None:
        return "an input is absent"
    producer = value.producer()
    if producer is not None:
        return f"'{value.name}' comes from {producer.op_type} '{node_label(producer)}'"
    return f"'{value.name}' is {'a constant' if value.const_value is not None else 'an input of the graph'}"


def _outside_reader(nodes: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> str:
    """Say who else reads a value that would disappear; empty when nobody does."""
    inside = set(nodes)
    for node in nodes:
        for value in node.outputs:
            if value in outputs:
                continue
            if value.is_graph_output():
                return f"'{value.name}', inside the pattern, is also an output of the graph"
            for reader, _ in value.uses():
                if reader not in inside:
                    return (
                        f"'{value.name}', inside the pattern, is also read by {reader.op_type} '{node_label(reader)}'"
                    )
    return ""
