"""Find the residual stream in a decoder graph: the hidden states after every attention and every feed-forward block.

    h'[i] = h[i] + attention(norm(h[i]))          h[i+1] = h'[i] + mlp(norm(h'[i]))

The sums may be plain Adds, fused functions (AddRmsNorm) or a target's kernels (SkipSimplifiedLayerNormalization). The
search starts at the logits and follows, from each sum to the one before it, the operand that was computed first: what a
block adds is always computed after what it is added to.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from qcompile.errors import GraphError
from qcompile.functions import DOMAIN

MICROSOFT = "com.microsoft"
# operator -> which output is the sum of its first two inputs
_FUSED_SUMS = {
    (DOMAIN, "AddRmsNorm"): 1,
    (DOMAIN, "AddLayerNorm"): 1,
    (MICROSOFT, "SkipSimplifiedLayerNormalization"): 3,
    (MICROSOFT, "SkipLayerNormalization"): 3,
}
_SAME_VALUES = {"Cast", "Identity"}
# Of these only the first input carries activations; the others say where or how much.
_FIRST_INPUT_ONLY = {"Reshape", "Expand", "Slice", "Gather", "GatherND", "Squeeze", "Unsqueeze", "ReduceMean", "Pow"}
_NO_ACTIVATIONS = {"Shape", "Size", "Range", "ConstantOfShape"}


def residual_stream(graph: ir.Graph, num_layers: int) -> list[ir.Value]:
    """Return the 2 x num_layers sums in order: attention 0, feed-forward 0, attention 1 and so on.

    A fused sum whose output the graph leaves out gets one (nothing else changes).

    Raises:
        GraphError: The graph has no such chain of sums.
    """
    stream = _Stream(graph)
    values = stream.backwards()
    if len(values) != 2 * num_layers:
        raise GraphError(
            f"graph '{graph.name}': {len(values)} residual sums lead to the logits, {2 * num_layers} are wanted "
            f"for {num_layers} layers"
        )
    return values[::-1]


class _Stream:
    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.order = {node: i for i, node in enumerate(graph)}
        self.constants = _constants(graph)

    def backwards(self) -> list[ir.Value]:
        """Return the sums from the last to the first."""
        values: list[ir.Value] = []
        node = self._last_sum()
        while node is not None:
            values.append(_sum_output(node))
            before = self._earlier_operand(node)
            producer = before.producer() if before is not None else None
            node = producer if producer is not None and self._is_sum(producer) else None
        return values

    def _last_sum(self) -> ir.Node | None:
        """Return the sum that is met first on the way back from the logits."""
        logits = next((v for v in self.graph.outputs if v.name == "logits"), None)
        producer = logits.producer() if logits is not None else None
        waiting = {producer} if producer is not None else set()
        while waiting:
            node = max(waiting, key=lambda n: self.order[n])
            waiting.discard(node)
            if self._is_sum(node):
                return node
            producers = (value.producer() for value in self._activations(node))
            waiting.update(p for p in producers if p is not None and p in self.order)
        return None

    def _activations(self, node: ir.Node) -> Iterator[ir.Value]:
        if node.op_type in _NO_ACTIVATIONS:
            return
        inputs = node.inputs[:1] if node.op_type in _FIRST_INPUT_ONLY else node.inputs
        yield from (v for v in inputs if v is not None and v not in self.constants)

    def _is_sum(self, node: ir.Node) -> bool:
        """Whether a node adds a block's output to the stream.

        A plain Add is one when what it adds to is read elsewhere too (by the norm); a correction inside a quantized
        projection, say, is the only reader of its operands.
        """
        if (node.domain, node.op_type) in _FUSED_SUMS:
            return True
        if (node.domain, node.op_type) != ("", "Add"):
            return False
        if any(v is None or v in self.constants for v in node.inputs):
            return False
        before = self._earlier_operand(node)
        if before is None:
            return False
        producer = before.producer()
        is_fused = producer is not None and (producer.domain, producer.op_type) in _FUSED_SUMS
        return is_fused or _num_readers(before) > 1

    def _earlier_operand(self, node: ir.Node) -> ir.Value | None:
        operands = [_unwrapped(v) for v in node.inputs[:2] if v is not None]
        return min(operands, key=self._position, default=None)

    def _position(self, value: ir.Value) -> int:
        producer = value.producer()
        return -1 if producer is None else self.order.get(producer, -1)


def _constants(graph: ir.Graph) -> set[ir.Value]:
    """Return initializers, and what is computed from constants alone."""
    found = set(graph.initializers.values()) - set(graph.inputs)
    for node in graph:
        if all(v is None or v in found for v in node.inputs):
            found.update(node.outputs)
    return found


def _unwrapped(value: ir.Value) -> ir.Value:
    """Follow Casts and Identities to where the numbers come from."""
    node = value.producer()
    while node is not None and node.domain == "" and node.op_type in _SAME_VALUES and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def _num_readers(value: ir.Value) -> int:
    """Count what reads a value, directly or through Casts and Identities."""
    count, waiting = 0, [value]
    while waiting:
        for usage in waiting.pop().uses():
            if usage.node.domain == "" and usage.node.op_type in _SAME_VALUES:
                waiting.append(usage.node.outputs[0])
            else:
                count += 1
    return count


def _sum_output(node: ir.Node) -> ir.Value:
    index = _FUSED_SUMS.get((node.domain, node.op_type), 0)
    if len(node.outputs) <= index:
        node.resize_outputs(index + 1)
    value = node.outputs[index]
    if not value.name:
        value.name = f"{node.name or node.outputs[0].name}.sum"
        value.type = node.outputs[0].type
    for gap in node.outputs:
        if gap.name is None:
            gap.name = ""
    return value
