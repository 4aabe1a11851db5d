"""int8 x int8 matrix product, dequantized in its epilogue: one source for NPU and GPU."""

import triton
import triton.language as tl


@triton.jit
def tile_of(tile, n_m_blocks, n_n_blocks, GROUP_M: tl.constexpr):
    """Block row and column of a tile, in bands of GROUP_M block rows (as in matmul_bias_residual)."""
    band_size = GROUP_M * n_n_blocks
    first_m = (tile // band_size) * GROUP_M
    height = tl.minimum(n_m_blocks - first_m, GROUP_M)
    return first_m + (tile % band_size) % height, (tile % band_size) // height


# fmt: off
@triton.jit
def matmul_int8_kernel(
    x_ptr, weight_ptr, x_scale_ptr, weight_scale_ptr, bias_ptr, out_ptr, n_rows, n_out, n_in,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, HAS_BIAS: tl.constexpr,
):
    # fmt: on
    """out[m, n] = x_scale[m] * weight_scale[n] * sum_k x[m, k] * weight[n, k] + bias[n]; the sum is exact, in int32."""
    n_m_blocks, n_n_blocks = tl.cdiv(n_rows, BLOCK_M), tl.cdiv(n_out, BLOCK_N)
    k = tl.arange(0, BLOCK_K)[None, :]
    for tile in range(tl.program_id(0), n_m_blocks * n_n_blocks, tl.num_programs(0)):
        block_m, block_n = tile_of(tile, n_m_blocks, n_n_blocks, GROUP_M)
        m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
        n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        x_tile = x_ptr + tl.cast(block_m, tl.int64) * BLOCK_M * n_in
        weight_tile = weight_ptr + tl.cast(block_n, tl.int64) * BLOCK_N * n_in
        x_offsets = tl.arange(0, BLOCK_M)[:, None] * n_in + k
        weight_offsets = tl.arange(0, BLOCK_N)[:, None] * n_in + k
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        for start in range(0, n_in, BLOCK_K):
            in_k = k < n_in - start
            x = tl.load(x_tile + start + x_offsets, mask=in_k & (m[:, None] < n_rows), other=0)
            weight = tl.load(weight_tile + start + weight_offsets, mask=in_k & (n[:, None] < n_out), other=0)
            total = tl.dot(x, tl.trans(weight), total, out_dtype=tl.int32)
        x_scale = tl.load(x_scale_ptr + m, mask=m < n_rows, other=0.0)
        weight_scale = tl.load(weight_scale_ptr + n, mask=n < n_out, other=0.0)
        out = total.to(tl.float32) * x_scale[:, None] * weight_scale[None, :]
        if HAS_BIAS:
            out += tl.load(bias_ptr + n, mask=n < n_out, other=0.0).to(tl.float32)[None, :]
        mask = (m[:, None] < n_rows) & (n[None, :] < n_out)
        out_tile = out_ptr + tl.cast(block_m, tl.int64) * BLOCK_M * n_out
        tl.store(
            out_tile + (tl.arange(0, BLOCK_M)[:, None] * n_out + n[None, :]),
            out.to(out_ptr.dtype.element_ty),
            mask=mask,
        )
