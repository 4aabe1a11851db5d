"""Dynamic symmetric int8 quantization, one scale a token: one source for NPU and GPU.

One row at a time: Ascend's compiler makes a cast of a two-dimensional tile to int8 through a buffer a hundred times its size.
"""

import triton
import triton.language as tl

TINY: tl.constexpr = tl.constexpr(1e-30)  # below it a row counts as zero: 127 / amax would overflow
ROUNDER: tl.constexpr = tl.constexpr(
    12582912.0
)  # 1.5 * 2**23: adding it rounds an fp32 to the nearest integer, ties to even


@triton.jit
def quantize(values, inverse):
    """int8 of values * inverse, rounded to nearest even by fp32 addition itself: the same bits on every machine.

    |values * inverse| cannot exceed 127 by more than a rounding, so nothing is clamped; NaN becomes 0.
    """
    scaled = values * inverse
    rounded = (scaled + ROUNDER) - ROUNDER
    return tl.where(rounded == rounded, rounded, 0.0).to(tl.int8)


@triton.jit
def largest(magnitudes):
    """The largest of non-negative values, at least TINY; NaN when one is NaN, which the maximum of some targets passes over."""
    total = tl.sum(magnitudes, axis=0)
    amax = tl.maximum(tl.max(magnitudes, axis=0), TINY, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(total == total, amax, total)


@triton.jit
def quantize_per_token_kernel(x_ptr, q_ptr, scale_ptr, n_rows, n_cols, x_stride, BLOCK_COLS: tl.constexpr):
    """scale = max|x| / 127; q = round(x / scale), rows of n_cols <= BLOCK_COLS; a GPU has in_pieces.py."""
    cols = tl.arange(0, BLOCK_COLS)
    mask = cols < n_cols
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        wide_row = tl.cast(row, tl.int64)
        x = tl.load(x_ptr + wide_row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
        amax = largest(tl.abs(x))
        tl.store(q_ptr + wide_row * n_cols + cols, quantize(x, 127.0 / amax), mask=mask)
        tl.store(scale_ptr + row, amax / 127.0)


@triton.jit
def quantize_long_rows_kernel(x_ptr, q_ptr, scale_ptr, n_rows, n_cols, x_stride, BLOCK_COLS: tl.constexpr):
    """The same for rows that do not fit: once over the row for its maximum, once more to quantize."""
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        base = x_ptr + tl.cast(row, tl.int64) * x_stride
        out = q_ptr + tl.cast(row, tl.int64) * n_cols
        magnitudes = tl.zeros((BLOCK_COLS,), dtype=tl.float32)
        for start in range(0, n_cols, BLOCK_COLS):
            cols = start + tl.arange(0, BLOCK_COLS)
            x = tl.load(base + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
            magnitudes = tl.maximum(magnitudes, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)
        amax = largest(magnitudes)
        for start in range(0, n_cols, BLOCK_COLS):
            cols = start + tl.arange(0, BLOCK_COLS)
            x = tl.load(base + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
            tl.store(out + cols, quantize(x, 127.0 / amax), mask=cols < n_cols)
        tl.store(scale_ptr + row, amax / 127.0)
