"""Quantized weights in the layouts that the chip's kernels read, computed while they are written.

Letters: N output channels, M inputs, g block, G = M / g. A fused model stores blocks along the inputs, [N, M] and scales
[N, G]; the kernels read [M, N] and [G, N].
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from qcompile.ascend.lowering.typed_weights import Factor
from qcompile.tensors import Array, StreamedTensor
from qcompile.weights import rows_of

# TransQuantParamV2: the low 13 bits of the mantissa are cleared, and this bit is set.
_PACKED_SCALE_BIT = np.uint64(1 << 46)
_KEPT_MANTISSA = np.uint32(0xFFFFE000)
_CODES_PER_WORD = 8


def codes_by_column(tensor: ir.TensorProtocol, first: int = 0, last: int | None = None) -> ir.TensorProtocol:
    """Turn int8 codes [N, M], or those of the output channels `first` to `last`, into [M, last - first]."""
    n, m = _matrix(tensor)
    last = n if last is None else last

    def make() -> Array:
        return np.ascontiguousarray(_rows(tensor, first, last).T)

    return _at_once(make, ir.DataType.INT8, (m, last - first))


def nibbles_by_column(tensor: ir.TensorProtocol, first: int = 0, last: int | None = None) -> ir.TensorProtocol:
    """Turn codes of 4 bits, uint8 [N, M / 2] with the first one low and 8 added, into int32 words [M, N / 8].

    A word holds the codes -8 to 7 of eight neighbouring output channels, the first one lowest. `first` and `last` are
    multiples of 8.
    """
    n, half = _matrix(tensor)
    last = n if last is None else last

    def make() -> Array:
        packed = _rows(tensor, first, last)
        words = np.zeros((2 * half, (last - first) // _CODES_PER_WORD), np.uint32)
        for channel in range(_CODES_PER_WORD):  # in two's complement: the 8 is taken off and put back by the xor
            codes = packed[channel::_CODES_PER_WORD].T
            for parity, nibbles in enumerate((codes & 15, codes >> 4)):
                words[parity::2] |= (nibbles ^ 8).astype(np.uint32) << np.uint32(4 * channel)
        return words.view(np.int32)

    return _at_once(make, ir.DataType.INT32, (2 * half, (last - first) // _CODES_PER_WORD))


def codes_of_words(words: Array) -> Array:
    """Turn int32 words [M, N / 8] back into codes int8 [M, N], -8 to 7."""
    shifts = np.arange(0, 4 * _CODES_PER_WORD, 4, dtype=np.uint32)
    codes = (words.view(np.uint32)[..., None] >> shifts) & np.uint32(15)
    signed = codes.astype(np.int8).reshape(words.shape[0], -1)
    return np.asarray(np.where(signed > 7, signed - 16, signed).astype(np.int8))


def scales_by_column(
    tensor: ir.TensorProtocol, dtype: ir.DataType, factor: Factor | None, first: int = 0, last: int | None = None
) -> ir.TensorProtocol:
    """Turn scales [N, G] into [G, last - first]; `factor` multiplies those of the first output channels."""
    n, blocks = _matrix(tensor)
    last = n if last is None else last

    def make() -> Array:
        scales = _rows(tensor, first, last).astype(np.float32)
        if factor is not None:
            scales[: max(factor[0] - first, 0)] *= np.float32(factor[1])
        return np.ascontiguousarray(scales.T).astype(dtype.numpy())

    return _at_once(make, dtype, (blocks, last - first))


def offsets_by_column(
    zero_points: ir.TensorProtocol, blocks: int, dtype: ir.DataType, first: int = 0, last: int | None = None
) -> ir.TensorProtocol:
    """Turn zero points of 4 bits, uint8 [N, ceil(G / 2)], into what the kernel adds to a code -8 to 7: [G, N]."""
    last = _matrix(zero_points)[0] if last is None else last

    def make() -> Array:
        packed = _rows(zero_points, first, last)
        points = np.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)[:, :blocks]
        return (8.0 - points.T.astype(np.float32)).astype(dtype.numpy())  # (code + 8 - point), stored minus 8

    return _at_once(make, dtype, (blocks, last - first))


def channel_scales(
    tensor: ir.TensorProtocol, factor: Factor | None, step: float = 1.0, pack: Callable[[Array], Array] | None = None
) -> ir.TensorProtocol:
    """Return the scales [N] of one per output channel, times the step of static activations, in float32 or packed."""
    n = int(tensor.shape[0])  # type: ignore[arg-type]

    def make() -> Array:
        scales = np.asarray(tensor.numpy()).astype(np.float32).reshape(-1) * np.float32(step)
        if factor is not None:
            scales[: factor[0]] *= np.float32(factor[1])
        return scales if pack is None else pack(scales)

    return _at_once(make, ir.DataType.FLOAT if pack is None else ir.DataType.UINT64, (n,))


def packed_scale(scales: Array) -> Array:
    """Pack float32 scales as QuantBatchMatMul reads them: uint64, as TransQuantParamV2 makes them."""
    bits = scales.astype(np.float32).view(np.uint32) & _KEPT_MANTISSA
    return np.asarray(bits.astype(np.uint64) | _PACKED_SCALE_BIT)


def plain_scale(scales: Array) -> Array:
    """Pack float32 scales as AscendDequant reads them: their bits in the low half of a uint64."""
    return np.asarray(scales.astype(np.float32).view(np.uint32).astype(np.uint64))


def scale_of_bits(packed: Array) -> Array:
    """Return the float32 scales in either packing."""
    return np.asarray((packed & np.uint64(0xFFFFFFFF)).astype(np.uint32).view(np.float32))


def dequantized(
    codes: ir.TensorProtocol,
    scales: ir.TensorProtocol,
    zero_points: ir.TensorProtocol | None,
    dtype: ir.DataType,
    factor: Factor | None = None,
) -> ir.TensorProtocol:
    """Return the float weight [N, M] of codes [N, M] int8, or [N, M / 2] of 4 bits, and scales [N, G].

    Args:
        codes: As a fused model stores them.
        scales: Of the blocks.
        zero_points: Of the blocks, for asymmetric codes of 4 bits.
        dtype: Float type of the result.
        factor: (count, number): the first `count` output channels are multiplied by `number`.
    """
    n, width = _matrix(codes)
    is_packed = codes.dtype == ir.DataType.UINT8
    m, blocks = width * (2 if is_packed else 1), _matrix(scales)[1]

    def rows(start: int, stop: int) -> Array:
        part = rows_of(codes, start, stop)
        values = part.astype(np.float32)
        if is_packed:
            values = np.stack([part & 15, part >> 4], axis=-1).reshape(stop - start, -1).astype(np.float32)
            values = values.reshape(stop - start, blocks, -1)
            if zero_points is None:
                values -= 8.0
            else:
                points = rows_of(zero_points, start, stop)
                unpacked = np.stack([points & 15, points >> 4], axis=-1).reshape(stop - start, -1)[:, :blocks]
                values -= unpacked.astype(np.float32)[..., None]
        values = values.reshape(stop - start, blocks, -1) * rows_of(scales, start, stop).astype(np.float32)[..., None]
        values = values.reshape(stop - start, m)
        if factor is not None:
            values[: max(factor[0] - start, 0)] *= np.float32(factor[1])
        return values.astype(dtype.numpy())

    return StreamedTensor(rows, dtype, ir.Shape([n, m]), row_multiple=getattr(codes, "row_multiple", 1))


def _at_once(make: Callable[[], Array], dtype: ir.DataType, shape: tuple[int, ...]) -> ir.TensorProtocol:
    """Return a tensor made whole when it is written: every row of it takes from every row of its source."""
    size_bytes = max(1, int(np.prod(shape)) * dtype.bitwidth // 8)
    return StreamedTensor(lambda start, stop: make()[start:stop], dtype, ir.Shape(shape), piece_bytes=size_bytes)


def _rows(tensor: ir.TensorProtocol, first: int, last: int) -> Array:
    """Return rows [first, last); a streamed tensor begins its own pieces where it must."""
    before = first % getattr(tensor, "row_multiple", 1)
    return rows_of(tensor, first - before, last)[before:]


def _matrix(tensor: ir.TensorProtocol) -> tuple[int, int]:
    rows, columns = (int(d) for d in tensor.shape.numpy())
    return rows, columns
