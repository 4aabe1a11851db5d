"""The product for the few rows of a decode step, on a GPU: all that counts is how many bytes of weights are on their way.

Tiles of the kernel for many rows are too few to keep the whole chip reading. These have few rows of weights to a program; the
arguments are the same. No NPU runs them: its programs walk over tiles.
"""

import triton
import triton.language as tl


# fmt: off
@triton.jit
def addends(
    bias_ptr, residual_tile, n, m, n_out, left, residual_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):
    # fmt: on
    """What is added to the product, [BLOCK_N, BLOCK_M] in fp32. Loaded before it, so that nothing waits at the end."""
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=n < n_out, other=0.0).to(tl.float32)[:, None]
    if HAS_RESIDUAL:
        mask = (n[:, None] < n_out) & (m[None, :] < left)
        total += tl.load(residual_tile + (m[None, :] * residual_stride + n[:, None]), mask=mask, other=0.0).to(tl.float32)
    return total


# fmt: off
@triton.jit
def matmul_one_row_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr,
    n_rows, n_out, n_in, x_stride, weight_stride, residual_stride,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):
    # fmt: on
    """BLOCK_N results of one row, program_id(1), without a matrix unit; STAGES tiles of weights are on their way at a time."""
    k, local_n = tl.arange(0, BLOCK_K)[None, :], tl.arange(0, BLOCK_N)
    n = tl.program_id(0) * BLOCK_N + local_n
    in_n = n < n_out
    row = tl.cast(tl.program_id(1), tl.int64)
    added = addends(
        bias_ptr, residual_ptr + row * residual_stride, n, tl.arange(0, 1), n_out, 1, residual_stride,
        1, BLOCK_N, HAS_BIAS, HAS_RESIDUAL,
    )  # fmt: skip
    weight_tile = weight_ptr + tl.cast(tl.program_id(0), tl.int64) * BLOCK_N * weight_stride
    x_row = x_ptr + row * x_stride
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for start in tl.range(0, n_in, BLOCK_K, num_stages=STAGES):
        in_k = k < n_in - start
        weight_mask = in_k & in_n[:, None]
        weight = tl.load(weight_tile + start + (local_n[:, None] * weight_stride + k), mask=weight_mask, other=0.0)
        x = tl.load(x_row + start + k, mask=in_k, other=0.0)
        total += weight.to(tl.float32) * x.to(tl.float32)
    out = tl.sum(total, axis=1)[:, None] + added
    tl.store(out_ptr + row * n_out + n[:, None], out.to(out_ptr.dtype.element_ty), mask=in_n[:, None])


# fmt: off
@triton.jit
def matmul_few_rows_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr,
    n_rows, n_out, n_in, x_stride, weight_stride, residual_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):
    # fmt: on
    """BLOCK_N results of BLOCK_M rows on the matrix units, which so read the weights once.

    A batched product: each of PARTS warps has its own slice of K, and the slices are summed once at the end. Weights are the
    left operand, of which the matrix instruction takes 16 rows; of the right one 8 columns are enough.
    """
    part, k = tl.arange(0, PARTS)[:, None, None], tl.arange(0, BLOCK_K)
    m, local_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    n = tl.program_id(0) * BLOCK_N + local_n
    first, left = tl.cast(tl.program_id(1), tl.int64) * BLOCK_M, n_rows - tl.program_id(1) * BLOCK_M
    in_n, in_m = n < n_out, m < left
    added = addends(
        bias_ptr, residual_ptr + first * residual_stride, n, m, n_out, left, residual_stride,
        BLOCK_M, BLOCK_N, HAS_BIAS, HAS_RESIDUAL,
    )  # fmt: skip
    weight_tile = weight_ptr + tl.cast(tl.program_id(0), tl.int64) * BLOCK_N * weight_stride
    x_tile = x_ptr + first * x_stride
    weight_k, x_k = part * BLOCK_K + k[None, None, :], part * BLOCK_K + k[None, :, None]
    weight_offsets = local_n[None, :, None] * weight_stride + weight_k
    x_offsets = m[None, None, :] * x_stride + x_k
    total = tl.zeros((PARTS, BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in range(0, n_in, BLOCK_K * PARTS):
        weight_mask = (weight_k < n_in - start) & in_n[None, :, None]
        weight = tl.load(weight_tile + start + weight_offsets, mask=weight_mask, other=0.0)
        x_mask = (x_k < n_in - start) & in_m[None, None, :]
        x = tl.load(x_tile + start + x_offsets, mask=x_mask, other=0.0)
        total = tl.dot(weight, x, total, input_precision="ieee")
    out = tl.sum(total, axis=0) + added
    mask = in_n[:, None] & in_m[None, :]
    out_tile = out_ptr + first * n_out
    tl.store(out_tile + (m[None, :] * n_out + n[:, None]), out.to(out_ptr.dtype.element_ty), mask=mask)
