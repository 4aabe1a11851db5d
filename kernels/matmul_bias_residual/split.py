"""The product for tens to hundreds of rows, on a GPU: K is cut into slices, so that a few tiles give all processors work.

One kernel stores the product of every tile and slice in fp32, a second sums the slices in their order and ends as the unsplit
kernel does. No atomics, so the same numbers every time. No NPU runs them: their programs do not walk over tiles.
"""

import triton
import triton.language as tl


# fmt: off
@triton.jit
def matmul_split_kernel(
    x_ptr, weight_ptr, partial_ptr, n_rows, n_out, n_in, x_stride, weight_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
):
    # fmt: on
    """partial[split, m, n] = sum of x[m, k] * weight[n, k] over the whole BLOCK_Ks that are the split's, perhaps none.

    Program ids are block of n, block of m, split: those that run at a time share x.
    """
    block_n, block_m, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n_steps = tl.cdiv(n_in, BLOCK_K)
    begin, end = split * n_steps // SPLITS * BLOCK_K, (split + 1) * n_steps // SPLITS * BLOCK_K
    k, local_m, local_n = tl.arange(0, BLOCK_K)[None, :], tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    m, n = block_m * BLOCK_M + local_m, block_n * BLOCK_N + local_n
    first = tl.cast(block_m, tl.int64) * BLOCK_M
    x_tile = x_ptr + first * x_stride
    weight_tile = weight_ptr + tl.cast(block_n, tl.int64) * BLOCK_N * weight_stride
    x_offsets = local_m[:, None] * x_stride + k
    weight_offsets = local_n[:, None] * weight_stride + k
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(begin, end, BLOCK_K):
        in_k = k < n_in - start
        x = tl.load(x_tile + start + x_offsets, mask=in_k & (m[:, None] < n_rows), other=0.0)
        weight = tl.load(weight_tile + start + weight_offsets, mask=in_k & (n[:, None] < n_out), other=0.0)
        total = tl.dot(x, tl.trans(weight), total, input_precision="ieee")
    partial_tile = partial_ptr + (tl.cast(split, tl.int64) * n_rows + first) * n_out
    tl.store(
        partial_tile + (local_m[:, None] * n_out + n[None, :]), total, mask=(m[:, None] < n_rows) & (n[None, :] < n_out)
    )


# fmt: off
@triton.jit
def matmul_sum_kernel(
    partial_ptr, bias_ptr, residual_ptr, out_ptr, n_rows, n_out, residual_stride,
    BLOCK_COLS: tl.constexpr, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    # fmt: on
    """out[m, n] = sum of partial[split, m, n] over splits + bias[n] + residual[m, n], rounded once; m is program_id(0).

    With PDL it is launched before the partial sums are there, and waits for them.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
    n = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask = n < n_out
    row = tl.cast(tl.program_id(0), tl.int64)
    total = tl.zeros((BLOCK_COLS,), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial_ptr + (row + split * n_rows) * n_out + n, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + row * residual_stride + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * n_out + n, total.to(out_ptr.dtype.element_ty), mask=mask)
