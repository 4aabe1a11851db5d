"""Who reads what in the main graph; what a subgraph captures counts as an input of the node that holds it."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir


class Links:
    """The edges of a graph, seen from its own nodes.

    Args:
        graph: The main graph; it must not change while the links are used.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.nodes = list(graph)
        self._inputs = {node: (*node.inputs, *_captured(node)) for node in self.nodes}
        self._readers: dict[ir.Value, list[ir.Node]] = {}
        for node in self.nodes:
            for value in dict.fromkeys(self._inputs[node]):
                if value is not None:
                    self._readers.setdefault(value, []).append(node)

    def inputs(self, node: ir.Node) -> list[ir.Value]:
        """Return the values a node reads, absent ones left out."""
        return [value for value in self._inputs[node] if value is not None]

    def producers(self, node: ir.Node) -> list[ir.Node]:
        """Return the nodes of the main graph that a node reads from."""
        producers = (value.producer() for value in self.inputs(node))
        return [producer for producer in producers if producer in self._inputs]

    def readers(self, node: ir.Node) -> list[ir.Node]:
        """Return the nodes of the main graph that read a node."""
        return [reader for output in node.outputs for reader in self.readers_of(output)]

    def readers_of(self, value: ir.Value) -> list[ir.Node]:
        """Return the nodes of the main graph that read a value."""
        return self._readers.get(value, [])


def _captured(node: ir.Node) -> Iterable[ir.Value]:
    """Yield what the subgraphs of a node read from outside of themselves."""
    for attribute in node.attributes.values():
        if attribute.is_ref() or attribute.type not in {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS}:
            continue
        graphs = [attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH else attribute.as_graphs()
        for graph in graphs:
            own = set(graph.inputs) | set(graph.initializers.values())
            own |= {output for inner in graph for output in inner.outputs}
            for inner in graph:
                read = (*inner.inputs, *_captured(inner))
                yield from (value for value in read if value is not None and value not in own)
