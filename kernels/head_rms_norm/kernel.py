"""Normalise the last axis by its root mean square: one source for NPU and GPU."""

import triton
import triton.language as tl


@triton.jit
def head_rms_norm_kernel(
    x_ptr,
    gamma_ptr,
    y_ptr,
    n_tokens,
    n_heads,
    n_cols,
    token_stride,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """y = x * rsqrt(mean(x * x) + eps) * gamma for the n_heads rows of n_cols <= BLOCK_COLS of every token.

    A token's heads lie side by side (x is a slice of the packed QKV output), tokens are token_stride apart.
    """
    cols = tl.arange(0, BLOCK_COLS)[None, :]
    rows = tl.arange(0, BLOCK_ROWS)[:, None]
    in_row = cols < n_cols
    gamma = tl.load(gamma_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
    groups = tl.cdiv(n_heads, BLOCK_ROWS)
    for tile in range(tl.program_id(0), n_tokens * groups, tl.num_programs(0)):
        token = tl.cast(tile // groups, tl.int64)
        head = (tile % groups) * BLOCK_ROWS
        mask = in_row & (head + rows < n_heads)
        offsets = (head + rows) * n_cols + cols
        x = tl.load(x_ptr + token * token_stride + offsets, mask=mask, other=0.0)
        wide = x.to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / n_cols + eps)
        y = (wide * scale[:, None] * gamma).to(x.dtype)
        tl.store(y_ptr + token * n_heads * n_cols + offsets, y, mask=mask)
