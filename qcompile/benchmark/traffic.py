"""How many bytes a model must read per token and how many multiply-adds it must do, from its graph alone.

Weights that a lookup reads (an embedding table that nothing multiplies by) cost one row and are left out; everything else is
read once per decode step whatever the batch. Attention's own arithmetic is left out: the figures are a lower bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from qcompile.artifact import load_model
from qcompile.runtime.manifest import ModelShape

# Operators that read some rows of an input, and which inputs: embedding tables, tables of rotary angles
_LOOKUPS = {
    "Gather": {0},
    "GatherBlockQuantized": {0, 2, 3},
    "GroupQueryAttention": {7, 8},
    "RotaryEmbedding": {2, 3},
}
# Kernels that multiply in 8-bit integers; MatMulNBits does so at accuracy level 4
_INTEGER_OPS = {"MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul", "QGemm"}
_FLOAT_OPS = {"MatMul", "Gemm", "FusedMatMul"}


@dataclass(frozen=True)
class Traffic:
    """The cost of one token.

    Attributes:
        weight_bytes: Read per decode step.
        kv_bytes_per_token: Read per cached token of each row.
        float_weights: Weights multiplied in floating point per token, the vocabulary projection left out.
        integer_weights: The same in 8-bit integers.
        head_weights: Weights of the vocabulary projection.
        head_is_integer: Whether that one multiplies in integers.
        scores_all: The vocabulary projection runs for every prompt token, not for the last alone.
    """

    weight_bytes: int
    kv_bytes_per_token: int
    float_weights: int
    integer_weights: int
    head_weights: int
    head_is_integer: bool
    scores_all: bool

    def decode_seconds(self, batch: int, context: float, floor: Floor) -> float:
        """The least time of one decode step: its bytes, or its arithmetic if that takes longer."""
        size_bytes = self.weight_bytes + batch * context * self.kv_bytes_per_token
        return max(size_bytes / floor.bytes_per_s, batch * self._compute_seconds(floor, with_head=True))

    def prefill_seconds(self, context: int, floor: Floor) -> float:
        """The least time of a prompt."""
        compute = context * self._compute_seconds(floor, with_head=self.scores_all)
        if not self.scores_all:
            compute += self._head_seconds(floor)
        return max(compute, self.weight_bytes / floor.bytes_per_s)

    def _compute_seconds(self, floor: Floor, *, with_head: bool) -> float:
        layers = 2 * self.float_weights / floor.float_ops_per_s + 2 * self.integer_weights / floor.integer_ops_per_s
        return layers + (self._head_seconds(floor) if with_head else 0.0)

    def _head_seconds(self, floor: Floor) -> float:
        rate = floor.integer_ops_per_s if self.head_is_integer else floor.float_ops_per_s
        return 2 * self.head_weights / rate


@dataclass(frozen=True)
class Floor:
    """What the machine allows; operations count two per multiply-add."""

    bytes_per_s: float
    float_ops_per_s: float
    integer_ops_per_s: float


def traffic_of(path: Path, shape: ModelShape) -> Traffic:
    """Read it off a graph.

    Raises:
        GraphError: The file cannot be read.
    """
    graph = load_model(path).graph
    multiplied, read = _weights(graph)
    head = [(size, is_integer) for size, is_integer, columns in multiplied if columns == shape.vocab_size]
    rest = [(size, is_integer) for size, is_integer, columns in multiplied if columns != shape.vocab_size]
    return Traffic(
        weight_bytes=sum(read.values()),
        kv_bytes_per_token=_kv_bytes(graph, shape),
        float_weights=sum(size for size, is_integer in rest if not is_integer),
        integer_weights=sum(size for size, is_integer in rest if is_integer),
        head_weights=sum(size for size, _ in head),
        head_is_integer=any(is_integer for _, is_integer in head),
        scores_all=not any(v.name == "last_token_index" for v in graph.inputs),
    )


def _weights(graph: ir.Graph) -> tuple[list[tuple[int, bool, int]], dict[str, int]]:
    """Return (weights, multiplied in integers, columns) per product, and bytes by initializer that is read whole."""
    shapes = _constant_shapes(graph)
    products, read = [], {}
    for node in graph:
        for i, value in enumerate(node.inputs):
            is_lookup = i in _LOOKUPS.get(node.op_type, ())
            if value is not None and value.is_initializer() and value.const_value is not None and not is_lookup:
                read[value.name or ""] = value.const_value.nbytes
        product = _product(node, [shapes[v] for v in node.inputs if v is not None and v in shapes])
        if product is not None:
            products.append(product)
    return products, read


def _constant_shapes(graph: ir.Graph) -> dict[ir.Value, tuple[int, ...]]:
    """Return the shape of every initializer and of what is computed from initializers alone (a dequantized weight).

    Where a computed value has no static shape of its own it is taken to have that of its largest operand.
    """
    shapes: dict[ir.Value, tuple[int, ...]] = {}
    for value in graph.initializers.values():
        if value.const_value is not None:
            shapes[value] = tuple(value.const_value.shape.numpy())
    for node in graph:
        operands = [v for v in node.inputs if v is not None]
        if operands and all(v in shapes for v in operands):
            largest = max((shapes[v] for v in operands), key=math.prod)
            shapes.update({v: _static_shape(v) or largest for v in node.outputs})
    return shapes


def _static_shape(value: ir.Value) -> tuple[int, ...] | None:
    if value.shape is None or not value.shape.is_static():
        return None
    return tuple(value.shape.numpy())


def _product(node: ir.Node, constants: list[tuple[int, ...]]) -> tuple[int, bool, int] | None:
    """Return the size of a matrix product with a constant: weights, whether in integers, columns."""
    if "K" in node.attributes and "N" in node.attributes:  # MatMulNBits
        inner, columns = node.attributes["K"].as_int(), node.attributes["N"].as_int()
        level = node.attributes.get("accuracy_level")
        return inner * columns, level is not None and level.as_int() == 4, columns
    matrices = [shape for shape in constants if len(shape) == 2]
    is_known = node.op_type in _INTEGER_OPS | _FLOAT_OPS or node.op_type.startswith("Linear")
    if not matrices or not is_known:
        return None
    largest = max(matrices, key=math.prod)
    transposed = "transB" in node.attributes and node.attributes["transB"].as_int() == 1
    return math.prod(largest), node.op_type in _INTEGER_OPS, largest[0 if transposed else 1]


def _kv_bytes(graph: ir.Graph, shape: ModelShape) -> int:
    total = 0
    for value in graph.inputs:
        if (value.name or "").startswith("past_key_values.") and value.dtype is not None:
            dims = [d for i, d in enumerate(value.shape or ()) if i in {1, 3} and isinstance(d, int)]
            known = dims if len(dims) == 2 else [shape.num_key_value_heads, shape.head_dim]
            total += math.prod(known) * value.dtype.bitwidth // 8
    return total
