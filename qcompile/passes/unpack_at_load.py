"""Codes that ONNX Runtime unpacks when it loads a model: uint8 [N, G, bytes] as its kernels read them, folded once.

    UnpackInt5(nibbles, rest)    ->   [nibbles & 15 | nibbles >> 4]  or  (128 where the bit above is set, else 112)
    UnpackInt6(nibbles, rest)    ->   the same with 96, 112, 128, 144
    UnpackInt4(nibbles)          ->   [nibbles & 15 | nibbles >> 4] + 120
    ShiftCodes(codes, z)         ->   the same codes + 128 - z, and no half of the range

Only operators of the standard domain are folded (ONNX Runtime 1.32); QLinearAdd would be five times as fast, and runs at every
step instead. The bits above the low four are looked up, a byte at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompile.packed_functions import SHIFT_CODES
from qcompile.passes.change import named_constant, static_dims
from qcompile.passes.kernel_rewrite import matrix_shape
from qcompile.passes.packed_codes import UNPACKED_BITS
from qcompile.weights import derived_rows, rows_of

_SIGN = np.uint8(128)
_MIDDLE = 128
_UINT8 = int(ir.DataType.UINT8)


def unsigned_blocks(graph: ir.Graph, codes: ir.Value, width: int, name: str) -> ir.Value:
    """Return codes that are computed from constants as uint8 [N, G, width], int8 ones plus 128; made once for all readers.

    Args:
        graph: The nodes go behind what computes the codes.
        codes: int8 [N, M] of an Unpack operator, or those and constants one below the other; or such uint8 [N, M / 2].
        width: Bytes of a block.
        name: Of the result.
    """
    known = next((node for node in graph if node.name == name), None)
    if known is not None:
        return known.outputs[0]
    nodes = _Nodes(graph, name)
    producer = codes.producer()
    assert producer is not None
    parts = [v for v in producer.inputs if v is not None] if producer.op_type == "Concat" else [codes]
    flat = [nodes.unsigned(part) for part in parts]
    num_rows, num_columns = matrix_shape(codes)
    joined = nodes.add("Concat", flat, [num_rows, num_columns], {"axis": 0}) if len(flat) > 1 else flat[0]
    num_blocks = num_columns // width
    shape = named_constant(graph, f"shape.keep1.{num_blocks}.{width}", np.array([0, num_blocks, width], np.int64))
    blocks = nodes.add("Reshape", [joined, shape], [num_rows, num_blocks, width])
    nodes.made[-1].name = name
    graph.insert_after(producer, nodes.made)
    return blocks


class _Nodes:
    """Nodes over uint8 constants, named after what they make."""

    def __init__(self, graph: ir.Graph, name: str) -> None:
        self.graph, self.name = graph, name
        self.made: list[ir.Node] = []

    def unsigned(self, codes: ir.Value) -> ir.Value:
        """Return codes int8 [N, M] plus 128; uint8 ones are stored as they are read."""
        node = codes.producer()
        if node is None:
            return codes if codes.dtype == ir.DataType.UINT8 else _shifted(self.graph, codes)
        if node.op_type != SHIFT_CODES.name:
            planes, centre = self._planes(node)
            return planes if centre == _MIDDLE else self._moved(planes, self._number(_MIDDLE - centre))
        packed, z = node.inputs
        unpacking = packed.producer() if packed is not None else None
        assert unpacking is not None
        assert z is not None
        planes, centre = self._planes(unpacking)
        least = _MIDDLE - centre + node.attributes["middle"].as_int()
        steps = self.add("Sub", [self._number(least), z], static_dims(z), dtype=ir.DataType.FLOAT)
        return self._moved(planes, steps)

    def _planes(self, node: ir.Node) -> tuple[ir.Value, int]:
        """Return codes uint8 [N, M] of an Unpack operator plus a number, and that number; 128 where it costs nothing."""
        bits = UNPACKED_BITS[node.op_type]
        nibbles = node.inputs[0]
        assert nibbles is not None
        num_rows, half = matrix_shape(nibbles)
        high = self.add("BitShift", [nibbles, self._byte(4)], [num_rows, half], {"direction": "RIGHT"})
        low = self.add("BitwiseAnd", [nibbles, self._byte(15)], [num_rows, half])
        shape = [num_rows, 2 * half]
        planes = self.add("Concat", [low, high], shape, {"axis": 1})
        if bits == 4:
            return planes, 8
        return self.add("BitwiseOr", [planes, self._rest(node.inputs[1], bits, shape)], shape), _MIDDLE

    def _moved(self, codes: ir.Value, steps: ir.Value) -> ir.Value:
        """Return uint8 [N, M] plus a number, or one [N, G] for each block; there is no Add of uint8."""
        shape, single = static_dims(codes), ir.DataType.FLOAT
        wide = self.add("Cast", [codes], shape, {"to": int(single)}, single)
        if not static_dims(steps):
            return self.add("Cast", [self.add("Add", [wide, steps], shape, dtype=single)], shape, {"to": _UINT8})
        num_rows, num_blocks = static_dims(steps)
        by_block, block = [num_rows, num_blocks, shape[1] // num_blocks], shape[1] // num_blocks
        groups = self.add("Reshape", [wide, self._row_shape(num_blocks, block)], by_block, dtype=single)
        last = named_constant(self.graph, "axes.last", np.array([-1], np.int64))
        columns = self.add("Unsqueeze", [steps, last], [num_rows, num_blocks, 1], dtype=single)
        moved = self.add("Add", [groups, columns], by_block, dtype=single)
        exact = self.add("Cast", [moved], by_block, {"to": _UINT8})
        return self.add("Reshape", [exact, self._row_shape(shape[1])], shape)

    def _rest(self, packed: ir.Value | None, bits: int, shape: Sequence[int]) -> ir.Value:
        """Return 16 * the bits above the low four + 128 - half the range, uint8 [N, M]: a row of a table for every byte."""
        assert packed is not None
        num_rows, num_bytes = matrix_shape(packed)
        width = bits - 4
        shifts = np.arange(0, 8, width, dtype=np.uint8)
        above = (np.arange(256, dtype=np.uint8)[:, None] >> shifts) & np.uint8((1 << width) - 1)
        rows = above * np.uint8(16) + np.uint8(128 - (1 << (bits - 1)))
        table = named_constant(self.graph, f"bits_above_four.of_bytes.{bits}", rows)
        indices = self.add("Cast", [packed], [num_rows, num_bytes], {"to": int(ir.DataType.INT32)}, ir.DataType.INT32)
        taken = self.add("Gather", [table, indices], [num_rows, num_bytes, 8 // width], {"axis": 0})
        return self.add("Reshape", [taken, self._row_shape(shape[1])], shape)

    def _row_shape(self, *sizes: int) -> ir.Value:
        name = "shape.keep1." + ".".join(map(str, sizes))
        return named_constant(self.graph, name, np.array([0, *sizes], np.int64))

    def _number(self, number: int) -> ir.Value:
        return named_constant(self.graph, f"float.{number}", np.array(number, np.float32))

    def _byte(self, number: int) -> ir.Value:
        return named_constant(self.graph, f"uint8.{number}", np.array(number, np.uint8))

    def add(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        shape: Sequence[int],
        attributes: dict[str, int | str] | None = None,
        dtype: ir.DataType = ir.DataType.UINT8,
    ) -> ir.Value:
        """Append a node with one output of a known type."""
        node = ir.node(op_type, inputs, attributes, name=f"{self.name}.{len(self.made)}")
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(dtype), ir.Shape(shape)
        self.made.append(node)
        return node.outputs[0]


def _shifted(graph: ir.Graph, codes: ir.Value) -> ir.Value:
    """Return the constant int8 [N, M] plus 128, as uint8."""
    name, tensor = f"{codes.name}.unsigned", codes.const_value
    assert tensor is not None
    if name not in graph.initializers:
        shifted = derived_rows(
            tensor,
            lambda start, stop: rows_of(tensor, start, stop).view(np.uint8) ^ _SIGN,
            ir.DataType.UINT8,
            tensor.shape.numpy(),
        )
        shifted.name = name
        kind = ir.TensorType(ir.DataType.UINT8)
        graph.register_initializer(ir.Value(name=name, type=kind, shape=shifted.shape, const_value=shifted))
    return graph.initializers[name]
