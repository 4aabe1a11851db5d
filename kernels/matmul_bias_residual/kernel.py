"""Matrix product with bias and residual in its epilogue: one source for NPU and GPU."""

import triton
import triton.language as tl


@triton.jit
def tile_of(tile, n_m_blocks, n_n_blocks, GROUP_M: tl.constexpr):
    """Block row and column of a tile, in bands of GROUP_M block rows, so that neighbours in time share their inputs."""
    band_size = GROUP_M * n_n_blocks
    first_m = (tile // band_size) * GROUP_M
    height = tl.minimum(n_m_blocks - first_m, GROUP_M)
    return first_m + (tile % band_size) % height, (tile % band_size) // height


# fmt: off
@triton.jit
def product(
    x_tile, weight_tile, in_m, in_n, n_in, x_stride, weight_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    # fmt: on
    """x @ weight.T of one tile, summed in fp32."""
    k = tl.arange(0, BLOCK_K)[None, :]
    x_offsets = tl.arange(0, BLOCK_M)[:, None] * x_stride + k
    weight_offsets = tl.arange(0, BLOCK_N)[:, None] * weight_stride + k
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, n_in, BLOCK_K):
        in_k = k < n_in - start
        x = tl.load(x_tile + start + x_offsets, mask=in_k & in_m[:, None], other=0.0)
        weight = tl.load(weight_tile + start + weight_offsets, mask=in_k & in_n[:, None], other=0.0)
        total = tl.dot(x, tl.trans(weight), total, input_precision="ieee")
    return total


@triton.jit
def matmul_bias_residual_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    n_rows,
    n_out,
    n_in,
    x_stride,
    weight_stride,
    residual_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """out[m, n] = sum_k x[m, k] * weight[n, k] + bias[n] + residual[m, n]; sums in fp32, rounded once."""
    n_m_blocks, n_n_blocks = tl.cdiv(n_rows, BLOCK_M), tl.cdiv(n_out, BLOCK_N)
    for tile in range(tl.program_id(0), n_m_blocks * n_n_blocks, tl.num_programs(0)):
        block_m, block_n = tile_of(tile, n_m_blocks, n_n_blocks, GROUP_M)
        m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
        n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        first = tl.cast(block_m, tl.int64) * BLOCK_M
        weight_tile = weight_ptr + tl.cast(block_n, tl.int64) * BLOCK_N * weight_stride
        in_m, in_n = m < n_rows, n < n_out
        total = product(
            x_ptr + first * x_stride, weight_tile, in_m, in_n, n_in, x_stride, weight_stride, BLOCK_M, BLOCK_N, BLOCK_K
        )
        mask = (m[:, None] < n_rows) & (n[None, :] < n_out)
        if HAS_BIAS:
            total += tl.load(bias_ptr + n, mask=n < n_out, other=0.0).to(tl.float32)[None, :]
        local = tl.arange(0, BLOCK_M)[:, None]
        if HAS_RESIDUAL:
            residual_tile = residual_ptr + first * residual_stride
            total += tl.load(residual_tile + (local * residual_stride + n[None, :]), mask=mask, other=0.0).to(
                tl.float32
            )
        tl.store(out_ptr + first * n_out + (local * n_out + n[None, :]), total.to(out_ptr.dtype.element_ty), mask=mask)
