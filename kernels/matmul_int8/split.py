"""The int8 product for tens to hundreds of rows, on a GPU: K is cut into slices (as in matmul_bias_residual).

One kernel stores the exact product of every tile and slice in int32, a second sums the slices and dequantizes: bit by bit what
the unsplit kernel gives. No NPU runs them: their programs do not walk over tiles.
"""

import triton
import triton.language as tl


# fmt: off
@triton.jit
def matmul_int8_split_kernel(
    x_ptr, weight_ptr, partial_ptr, n_rows, n_out, n_in,
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
    x_tile, weight_tile = x_ptr + first * n_in, weight_ptr + tl.cast(block_n, tl.int64) * BLOCK_N * n_in
    x_offsets, weight_offsets = local_m[:, None] * n_in + k, local_n[:, None] * n_in + k
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(begin, end, BLOCK_K):
        in_k = k < n_in - start
        x = tl.load(x_tile + start + x_offsets, mask=in_k & (m[:, None] < n_rows), other=0)
        weight = tl.load(weight_tile + start + weight_offsets, mask=in_k & (n[:, None] < n_out), other=0)
        total = tl.dot(x, tl.trans(weight), total, out_dtype=tl.int32)
    partial_tile = partial_ptr + (tl.cast(split, tl.int64) * n_rows + first) * n_out
    tl.store(
        partial_tile + (local_m[:, None] * n_out + n[None, :]), total, mask=(m[:, None] < n_rows) & (n[None, :] < n_out)
    )


# fmt: off
@triton.jit
def matmul_int8_sum_kernel(
    partial_ptr, x_scale_ptr, weight_scale_ptr, bias_ptr, out_ptr, n_rows, n_out,
    BLOCK_COLS: tl.constexpr, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr,
):
    # fmt: on
    """out[m, n] = x_scale[m] * weight_scale[n] * sum of partial[split, m, n] over splits + bias[n]; m is program_id(0)."""
    n = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask = n < n_out
    row = tl.cast(tl.program_id(0), tl.int64)
    total = tl.zeros((BLOCK_COLS,), dtype=tl.int32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial_ptr + (row + split * n_rows) * n_out + n, mask=mask, other=0)
    weight_scale = tl.load(weight_scale_ptr + n, mask=mask, other=0.0)
    out = total.to(tl.float32) * tl.load(x_scale_ptr + row) * weight_scale
    if HAS_BIAS:
        out += tl.load(bias_ptr + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * n_out + n, out.to(out_ptr.dtype.element_ty), mask=mask)
