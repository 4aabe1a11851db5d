"""silu(gate) * up: one source for NPU and GPU."""

import triton
import triton.language as tl


@triton.jit
def swiglu_tile(row, block, gate_up_ptr, out_ptr, n_cols, row_stride, BLOCK_COLS: tl.constexpr, ONCE: tl.constexpr):
    """BLOCK_COLS results of one row; row is int64."""
    POLICY: tl.constexpr = "evict_first" if ONCE else ""
    cols = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask = cols < n_cols
    gate = tl.load(gate_up_ptr + row * row_stride + cols, mask=mask, other=0.0, eviction_policy=POLICY)
    up = tl.load(gate_up_ptr + row * row_stride + n_cols + cols, mask=mask, other=0.0, eviction_policy=POLICY)
    wide = gate.to(tl.float32)
    out = wide / (1.0 + tl.exp(-wide)) * up.to(tl.float32)
    tl.store(out_ptr + row * n_cols + cols, out.to(gate.dtype), mask=mask)


# fmt: off
@triton.jit
def swiglu_kernel(
    gate_up_ptr, out_ptr, n_rows, n_cols, row_stride, BLOCK_COLS: tl.constexpr, WALK: tl.constexpr, ONCE: tl.constexpr
):
    # fmt: on
    """out = gate / (1 + exp(-gate)) * up; a row holds n_cols gates, then n_cols ups.

    WALK: a program goes over tiles, as an NPU wants it. Without, there is a program for each tile, in a grid of blocks by
    rows: the walk's divisions are much of what a GPU does in a decode step. ONCE marks what is read to leave the cache first.
    """
    if WALK:
        blocks = tl.cdiv(n_cols, BLOCK_COLS)
        for tile in range(tl.program_id(0), n_rows * blocks, tl.num_programs(0)):
            row = tl.cast(tile // blocks, tl.int64)
            swiglu_tile(row, tile % blocks, gate_up_ptr, out_ptr, n_cols, row_stride, BLOCK_COLS, ONCE)
    else:
        row = tl.cast(tl.program_id(1), tl.int64)
        swiglu_tile(row, tl.program_id(0), gate_up_ptr, out_ptr, n_cols, row_stride, BLOCK_COLS, ONCE)
