"""What constants that are computed in the graph come to: unpacked codes, scales that are multiplied out, joined rows.

    UnpackInt4 | UnpackInt5 | UnpackInt6 | ShiftCodes | BlockScales | RepeatScales | ZeroPoints | PackInt4
    Cast | Concat of rows

A proof reads a few rows of them, and must not compute the others.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from qcompile.functions import DOMAIN
from qcompile.packed_functions import BLOCK_SCALES, PACK_INT4, REPEAT_SCALES, SHIFT_CODES, UNPACKING, ZERO_POINTS
from qcompile.quant.packing import packed_pairs
from qcompile.tensors import Array, RowFunction, StreamedTensor
from qcompile.weights import rows_of

UNPACKED_BITS = {op.name: bits for bits, op in UNPACKING.items()}


def computed_tensor(value: ir.Value) -> ir.TensorProtocol | None:
    """Return the tensor that a value is, if it is a constant or made of constants in one of these ways."""
    if value.const_value is not None:
        return value.const_value
    node = value.producer()
    if node is None:
        return None
    inputs = [computed_tensor(v) if v is not None else None for v in node.inputs]
    if node.domain == "" and node.op_type == "Concat" and node.attributes["axis"].as_int() == 0:
        known = [tensor for tensor in inputs if tensor is not None]
        return _stacked(known) if len(known) == len(inputs) else None
    compute = _row_function(node)
    known = [tensor for tensor in inputs if tensor is not None]
    return _computed(known, compute) if compute is not None and len(known) == len(inputs) else None


def _row_function(node: ir.Node) -> Callable[..., Array] | None:
    """Return what an operator makes of the same rows of its inputs."""
    if node.domain == "" and node.op_type == "Cast":
        dtype = ir.DataType(node.attributes["to"].as_int()).numpy()
        return lambda rows: rows.astype(dtype)
    if node.domain != DOMAIN:
        return None
    if node.op_type == BLOCK_SCALES.name:
        return lambda codes, steps: codes * np.repeat(steps, codes.shape[1] // steps.shape[1], axis=1)
    if node.op_type == REPEAT_SCALES.name:
        times = node.attributes["times"].as_int()
        return lambda rows: np.repeat(rows, times, axis=1)
    if node.op_type == ZERO_POINTS.name:
        largest = node.attributes["largest"].as_int()
        return lambda scales, minima: zero_points(scales, minima, largest)
    if node.op_type == SHIFT_CODES.name:
        middle = node.attributes["middle"].as_int()
        return lambda codes, z: shifted(codes, z, middle)
    if node.op_type == PACK_INT4.name:
        return packed_pairs
    bits = UNPACKED_BITS.get(node.op_type)
    return None if bits is None else lambda nibbles, *rest: unpacked(nibbles, *rest, bits=bits)


def zero_points(scales: Array, minima: Array, largest: int) -> Array:
    """Return the code nearest to 0 of each block, float32 [N, G]."""
    exact = minima / np.where(scales == 0, np.float32(1), scales)
    return np.asarray(np.clip(np.rint(exact), np.float32(0), np.float32(largest)))


def shifted(codes: Array, z: Array, middle: int) -> Array:
    """Return codes + middle - z, int8 [N, M]."""
    steps = np.repeat((middle - z).astype(np.int8), codes.shape[1] // z.shape[1], axis=1)
    return np.asarray(codes + steps)


def unpacked(nibbles: Array, rest: Array | None = None, *, bits: int) -> Array:
    """Return the codes int8 [N, M] of uint8 nibbles [N, M / 2] and the bits above."""
    planes = np.concatenate([nibbles & np.uint8(15), nibbles >> np.uint8(4)], axis=1).astype(np.int16)
    if rest is not None:
        width = bits - 4
        columns = rest[:, :, None] >> np.arange(0, 8, width, dtype=np.uint8)
        planes += (columns.reshape(planes.shape) & np.uint8((1 << width) - 1)).astype(np.int16) << 4
    return np.asarray((planes - (1 << (bits - 1))).astype(np.int8))


def _computed(inputs: list[ir.TensorProtocol], compute: Callable[..., Array]) -> StreamedTensor:
    def rows(start: int, stop: int) -> Array:
        return compute(*(rows_of(tensor, start, stop) for tensor in inputs))

    sample = compute(*(np.zeros((1, int(t.shape.numpy()[1])), t.dtype.numpy()) for t in inputs))
    shape = ir.Shape([int(inputs[0].shape.numpy()[0]), sample.shape[1]])
    return StreamedTensor(rows, ir.DataType.from_numpy(sample.dtype), shape)


def _stacked(parts: list[ir.TensorProtocol]) -> StreamedTensor:
    heights = [int(part.shape.numpy()[0]) for part in parts]
    width = int(parts[0].shape.numpy()[1])

    def rows(start: int, stop: int) -> Array:
        pieces, offset = [], 0
        for part, height in zip(parts, heights, strict=True):
            low, high = max(start - offset, 0), min(stop - offset, height)
            if low < high:
                pieces.append(rows_of(part, low, high))
            offset += height
        return np.concatenate(pieces)

    function: RowFunction = rows
    return StreamedTensor(function, parts[0].dtype, ir.Shape([sum(heights), width]))
