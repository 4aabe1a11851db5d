"""Add a residual and normalise by mean and variance: one source for NPU and GPU."""

import triton
import triton.language as tl


# fmt: off
@triton.jit
def add_layer_norm_tile(
    tile, gamma, beta, x_ptr, residual_ptr, y_ptr, h_ptr, n_rows, n_cols, x_stride, residual_stride, eps,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, WALK: tl.constexpr,
):
    # fmt: on
    """BLOCK_ROWS rows; gamma and beta are fp32 [1, BLOCK_COLS]."""
    cols = tl.arange(0, BLOCK_COLS)[None, :]
    rows = tl.arange(0, BLOCK_ROWS)[:, None]
    first = tl.cast(tile, tl.int64) * BLOCK_ROWS
    mask = cols < n_cols
    if WALK or BLOCK_ROWS > 1:  # else there is a program for each row
        mask = mask & (tile * BLOCK_ROWS + rows < n_rows)
    x = tl.load(x_ptr + first * x_stride + (rows * x_stride + cols), mask=mask, other=0.0)
    residual = tl.load(residual_ptr + first * residual_stride + (rows * residual_stride + cols), mask=mask, other=0.0)
    h = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
    out = first * n_cols + (rows * n_cols + cols)
    tl.store(h_ptr + out, h, mask=mask)
    wide = h.to(tl.float32)
    mean = tl.sum(wide, axis=1) / n_cols
    centred = tl.where(mask, wide - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=1) / n_cols + eps)
    tl.store(y_ptr + out, (centred * scale[:, None] * gamma + beta).to(x.dtype), mask=mask)


@triton.jit
def add_layer_norm_kernel(
    x_ptr,
    residual_ptr,
    gamma_ptr,
    beta_ptr,
    y_ptr,
    h_ptr,
    n_rows,
    n_cols,
    x_stride,
    residual_stride,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    WALK: tl.constexpr,
):
    """h = x + residual; y = (h - mean(h)) * rsqrt(var(h) + eps) * gamma + beta, rows of n_cols <= BLOCK_COLS.

    The variance is that of the centred row: the row is in registers (or in the unified buffer) anyway, and E[h^2] - E[h]^2
    loses every digit when the mean is large. WALK as in add_rms_norm.
    """
    cols = tl.arange(0, BLOCK_COLS)[None, :]
    gamma = tl.load(gamma_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
    if WALK:
        for tile in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_ROWS), tl.num_programs(0)):
            add_layer_norm_tile(
                tile, gamma, beta, x_ptr, residual_ptr, y_ptr, h_ptr, n_rows, n_cols, x_stride, residual_stride, eps,
                BLOCK_ROWS, BLOCK_COLS, WALK,
            )  # fmt: skip
    else:
        add_layer_norm_tile(
            tl.program_id(0), gamma, beta, x_ptr, residual_ptr, y_ptr, h_ptr, n_rows, n_cols, x_stride, residual_stride,
            eps, BLOCK_ROWS, BLOCK_COLS, WALK,
        )  # fmt: skip
