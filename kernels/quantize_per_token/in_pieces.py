"""Dynamic int8 on a GPU: a row of any length in registers, with few idle lanes.

The smallest power of two above a row is up to twice its length. Here a row is a power of two of full pieces and a part of
one more. No NPU runs it: there is a program for each row.
"""

import triton
import triton.language as tl

from qcompile.kernels.quantize_per_token.kernel import TINY, quantize


@triton.jit
def quantize_in_pieces_kernel(
    x_ptr, q_ptr, scale_ptr, n_cols, x_stride, PIECES: tl.constexpr, BLOCK_COLS: tl.constexpr
):
    """As quantize_per_token_kernel, for PIECES * BLOCK_COLS <= n_cols <= (PIECES + 1) * BLOCK_COLS.

    The largest magnitude is that of the largest bits, taken for an integer: a NaN's are above those of inf, and warps have an
    instruction for it.
    """
    row = tl.cast(tl.program_id(0), tl.int64)
    cols = tl.arange(0, BLOCK_COLS)
    full = tl.arange(0, PIECES)[:, None] * BLOCK_COLS + cols[None, :]
    part = PIECES * BLOCK_COLS + cols
    x_full = tl.load(x_ptr + row * x_stride + full).to(tl.float32)
    x_part = tl.load(x_ptr + row * x_stride + part, mask=part < n_cols, other=0.0).to(tl.float32)
    bits_full = tl.max(tl.abs(x_full).to(tl.int32, bitcast=True), axis=0)
    bits = tl.max(tl.maximum(bits_full, tl.abs(x_part).to(tl.int32, bitcast=True)), axis=0)
    amax = tl.maximum(bits.to(tl.float32, bitcast=True), TINY, propagate_nan=tl.PropagateNan.ALL)
    tl.store(q_ptr + row * n_cols + full, quantize(x_full, 127.0 / amax))
    tl.store(q_ptr + row * n_cols + part, quantize(x_part, 127.0 / amax), mask=part < n_cols)
    tl.store(scale_ptr + row, amax / 127.0)
