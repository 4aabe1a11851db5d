"""Add a residual, normalise, quantize to int8: one source for NPU and GPU (one row at a time, as in quantize_per_token)."""

import triton
import triton.language as tl

TINY: tl.constexpr = tl.constexpr(1e-30)  # as in quantize_per_token
ROUNDER: tl.constexpr = tl.constexpr(12582912.0)


@triton.jit
def sum_and_largest(sum_a, largest_a, sum_b, largest_b):
    """Combine two parts of a row: the sum of the ones, and the larger of the others or NaN."""
    return sum_a + sum_b, tl.maximum(largest_a, largest_b, propagate_nan=tl.PropagateNan.ALL)


# fmt: off
@triton.jit
def add_rms_norm_quantize_row(
    row, gamma, x_ptr, residual_ptr, q_ptr, scale_ptr, h_ptr, n_cols, x_stride, residual_stride, eps,
    BLOCK_COLS: tl.constexpr, WALK: tl.constexpr,
):
    # fmt: on
    """One row; gamma is fp32 [BLOCK_COLS].

    Without a walk (on a GPU) both reductions are one, of two numbers, since max|y| is max|h * gamma| times the norm's scale.
    """
    cols = tl.arange(0, BLOCK_COLS)
    mask = cols < n_cols
    wide_row = tl.cast(row, tl.int64)
    x = tl.load(x_ptr + wide_row * x_stride + cols, mask=mask, other=0.0)
    residual = tl.load(residual_ptr + wide_row * residual_stride + cols, mask=mask, other=0.0)
    h = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
    out = wide_row * n_cols + cols
    tl.store(h_ptr + out, h, mask=mask)
    wide = h.to(tl.float32)
    if WALK:
        y = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / n_cols + eps) * gamma
        total = tl.sum(tl.abs(y), axis=0)  # NaN when a value is: the maximum of some targets passes over NaN
        amax = tl.maximum(tl.max(tl.abs(y), axis=0), TINY, propagate_nan=tl.PropagateNan.ALL)
        amax = tl.where(total == total, amax, total)
    else:
        y = wide * gamma
        squares, largest = tl.reduce((wide * wide, tl.abs(y)), 0, sum_and_largest)
        norm = tl.rsqrt(squares / n_cols + eps)
        y *= norm
        amax = tl.maximum(largest * norm, TINY, propagate_nan=tl.PropagateNan.ALL)
    rounded = (y * (127.0 / amax) + ROUNDER) - ROUNDER
    tl.store(q_ptr + out, tl.where(rounded == rounded, rounded, 0.0).to(tl.int8), mask=mask)
    tl.store(scale_ptr + row, amax / 127.0)


@triton.jit
def add_rms_norm_quantize_kernel(
    x_ptr,
    residual_ptr,
    gamma_ptr,
    q_ptr,
    scale_ptr,
    h_ptr,
    n_rows,
    n_cols,
    x_stride,
    residual_stride,
    eps,
    BLOCK_COLS: tl.constexpr,
    WALK: tl.constexpr,
):
    """h = x + residual; y = rms_norm(h) * gamma; scale = max|y| / 127; q = round(y / scale). y never leaves the core.

    WALK as in add_rms_norm.
    """
    cols = tl.arange(0, BLOCK_COLS)
    gamma = tl.load(gamma_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
    if WALK:
        for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
            add_rms_norm_quantize_row(
                row, gamma, x_ptr, residual_ptr, q_ptr, scale_ptr, h_ptr, n_cols, x_stride, residual_stride, eps,
                BLOCK_COLS, WALK,
            )  # fmt: skip
    else:
        add_rms_norm_quantize_row(
            tl.program_id(0), gamma, x_ptr, residual_ptr, q_ptr, scale_ptr, h_ptr, n_cols, x_stride, residual_stride, eps,
            BLOCK_COLS, WALK,
        )  # fmt: skip
