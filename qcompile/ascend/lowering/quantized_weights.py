"""Quantized weights in the layouts that the chip's kernels read, computed while they are written.

Letters: N output channels, M inputs, g block, G = M / g. A fused model stores blocks along the inputs, [N, M] and scales
[N, G]; the kernels read [M, N] and [G, N].
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.ascend.lowering.typed_weights import Factor
from qcompile.tensors import Array, StreamedTensor
from qcompile.weights import rows_of

# TransQuantParamV2: the low 13 bits of the mantissa are cleared, and this bit is set.
_PACKED_SCALE_BIT = np.uint64(1 << 46)
_KEPT_MANTISSA = np.uint32(0xFFFFE000)
_CODES_PER_WORD = 8


def codes_by_column(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """Turn int8 codes [N, M] into [M, N]."""
    n, m = _matrix(tensor)

    def rows(start: int, stop: int) -> Array:
        return np.ascontiguousarray(np.asarray(tensor.numpy())[:, start:stop].T)

    return StreamedTensor(rows, ir.DataType.INT8, ir.Shape([m, n]))


def nibbles_by_column(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """Turn codes of 4 bits, uint8 [N, M / 2] with the first one low and 8 added, into int32 words [M, N / 8].

    A word holds the codes -8 to 7 of eight neighbouring output channels, the first one lowest.
    """
    n, half = _matrix(tensor)

    def rows(start: int, stop: int) -> Array:
        packed = np.asarray(tensor.numpy())[:, start // 2 : -(-stop // 2)]
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(n, -1)[:, start % 2 :][:, : stop - start]
        signed = (codes.astype(np.int64) - 8) & 15
        words = signed.T.reshape(stop - start, n // _CODES_PER_WORD, _CODES_PER_WORD)
        shifts = 4 * np.arange(_CODES_PER_WORD)
        return np.ascontiguousarray((words << shifts).sum(axis=-1).astype(np.uint32).view(np.int32))

    return StreamedTensor(rows, ir.DataType.INT32, ir.Shape([2 * half, n // _CODES_PER_WORD]))


def codes_of_words(words: Array) -> Array:
    """Turn int32 words [M, N / 8] back into codes int8 [M, N], -8 to 7."""
    shifts = np.arange(0, 4 * _CODES_PER_WORD, 4, dtype=np.uint32)
    codes = (words.view(np.uint32)[..., None] >> shifts) & np.uint32(15)
    signed = codes.astype(np.int8).reshape(words.shape[0], -1)
    return np.asarray(np.where(signed > 7, signed - 16, signed).astype(np.int8))


def scales_by_column(tensor: ir.TensorProtocol, factor: Factor | None) -> Array:
    """Turn scales [N, G] into [G, N] float32; `factor` multiplies those of the first output channels."""
    scales = tensor.numpy().astype(np.float32).T.copy()
    if factor is not None:
        scales[:, : factor[0]] *= np.float32(factor[1])
    return scales


def offsets_by_column(zero_points: ir.TensorProtocol, blocks: int) -> Array:
    """Turn zero points of 4 bits, uint8 [N, ceil(G / 2)], into what the kernel adds to a code -8 to 7: [G, N]."""
    packed = zero_points.numpy()
    points = np.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)[:, :blocks]
    return np.asarray(8.0 - points.T.astype(np.float32))  # (code + 8 - point) with code stored minus 8


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

    return StreamedTensor(rows, dtype, ir.Shape([n, m]))


def _matrix(tensor: ir.TensorProtocol) -> tuple[int, int]:
    rows, columns = (int(d) for d in tensor.shape.numpy())
    return rows, columns
