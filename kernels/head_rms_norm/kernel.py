"""Normalise the last axis by its root mean square: one source for NPU and GPU."""

import triton
import triton.language as tl


# fmt: off
@triton.jit
def head_rms_norm_tile(
    token, group, gamma, x_ptr, y_ptr, n_heads, n_cols, token_stride, eps,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):
    # fmt: on
    """BLOCK_ROWS heads of one token; token is int64, gamma is fp32 [1 or BLOCK_ROWS, BLOCK_COLS]."""
    cols = tl.arange(0, BLOCK_COLS)[None, :]
    rows = tl.arange(0, BLOCK_ROWS)[:, None]
    head = group * BLOCK_ROWS
    mask = (cols < n_cols) & (head + rows < n_heads)
    offsets = (head + rows) * n_cols + cols
    x = tl.load(x_ptr + token * token_stride + offsets, mask=mask, other=0.0)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / n_cols + eps)
    y = (wide * scale[:, None] * gamma).to(x.dtype)
    tl.store(y_ptr + token * n_heads * n_cols + offsets, y, mask=mask)


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
    WALK: tl.constexpr,
):
    """y = x * rsqrt(mean(x * x) + eps) * gamma for the n_heads rows of n_cols <= BLOCK_COLS of every token.

    A token's heads lie side by side (x is a slice of the packed QKV output), tokens are token_stride apart. WALK as in
    swiglu: without it the grid has an axis of groups of heads and one of tokens.
    """
    cols = tl.arange(0, BLOCK_COLS)[None, :]
    if not WALK:  # a copy a row, so that each thread loads what it needs: else gamma passes through shared memory
        cols = tl.broadcast_to(cols, (BLOCK_ROWS, BLOCK_COLS))
    gamma = tl.load(gamma_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
    if WALK:
        groups = tl.cdiv(n_heads, BLOCK_ROWS)
        for tile in range(tl.program_id(0), n_tokens * groups, tl.num_programs(0)):
            head_rms_norm_tile(
                tl.cast(tile // groups, tl.int64), tile % groups, gamma, x_ptr, y_ptr, n_heads, n_cols, token_stride, eps,
                BLOCK_ROWS, BLOCK_COLS,
            )  # fmt: skip
    else:
        head_rms_norm_tile(
            tl.cast(tl.program_id(1), tl.int64), tl.program_id(0), gamma, x_ptr, y_ptr, n_heads, n_cols, token_stride, eps,
            BLOCK_ROWS, BLOCK_COLS,
        )  # fmt: skip
