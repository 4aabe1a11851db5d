"""swiglu on a GPU for many rows: a tile has several rows and few columns, so that no lane idles where F is odd."""

import triton
import triton.language as tl


@triton.jit
def swiglu_rows_kernel(
    gate_up_ptr, out_ptr, n_rows, n_cols, row_stride, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr
):
    """As swiglu_kernel, for BLOCK_ROWS rows and BLOCK_COLS columns a program."""
    cols = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    rows = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    mask = (cols < n_cols) & (rows < n_rows)
    wide_rows = rows.to(tl.int64)
    gate = tl.load(gate_up_ptr + wide_rows * row_stride + cols, mask=mask, other=0.0)
    up = tl.load(gate_up_ptr + wide_rows * row_stride + n_cols + cols, mask=mask, other=0.0)
    wide = gate.to(tl.float32)
    out = wide / (1.0 + tl.exp(-wide)) * up.to(tl.float32)
    tl.store(out_ptr + wide_rows * n_cols + cols, out.to(gate.dtype), mask=mask)
