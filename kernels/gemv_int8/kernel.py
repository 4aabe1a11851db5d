"""Weight-only int8 product for a few rows: one source for NPU and GPU (several rows on a GPU: few_rows.py).

No tl.dot on an NPU: Ascend's cube core takes no int8 weights beside fp16 activations, so the compiler would write the widened
weights to memory and read them again, which is the traffic that int8 is to save.
"""

import triton
import triton.language as tl


@triton.jit
def products(x_tile, weight_tile, in_n, local_n, k, n_in, left):
    """x * weight for BLOCK_N rows of weights and BLOCK_K columns, of which `left` are there."""
    in_k = k < left
    weight = tl.load(weight_tile + (local_n[:, None] * n_in + k), mask=in_k & in_n[:, None], other=0)
    x = tl.load(x_tile + k, mask=in_k, other=0.0)
    return weight.to(tl.float32) * x.to(tl.float32)


# fmt: off
@triton.jit
def gemv_tile(
    tile, x_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, n_rows, n_out, n_in, x_stride,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HAS_BIAS: tl.constexpr, STAGES: tl.constexpr,
):
    # fmt: on
    """BLOCK_N results of one row of x. Rows of one n-block follow each other: they share the weights in the cache."""
    k = tl.arange(0, BLOCK_K)[None, :]
    local_n = tl.arange(0, BLOCK_N)
    block_n = tile // n_rows
    row = tl.cast(tile % n_rows, tl.int64)
    n = block_n * BLOCK_N + local_n
    in_n = n < n_out
    weight_tile = weight_ptr + tl.cast(block_n, tl.int64) * BLOCK_N * n_in
    x_row = x_ptr + row * x_stride
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    if STAGES:
        for start in tl.range(0, n_in, BLOCK_K, num_stages=STAGES):
            total += products(x_row + start, weight_tile + start, in_n, local_n, k, n_in, n_in - start)
    else:
        for start in range(0, n_in, BLOCK_K):
            total += products(x_row + start, weight_tile + start, in_n, local_n, k, n_in, n_in - start)
    out = tl.sum(total, axis=1) * tl.load(scale_ptr + n, mask=in_n, other=0.0).to(tl.float32)
    if HAS_BIAS:
        out += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * n_out + n, out.to(out_ptr.dtype.element_ty), mask=in_n)


# fmt: off
@triton.jit
def gemv_int8_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, n_rows, n_out, n_in, x_stride,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HAS_BIAS: tl.constexpr, STAGES: tl.constexpr,
):
    # fmt: on
    """out[m, n] = scale[n] * sum_k x[m, k] * weight[n, k] + bias[n].

    STAGES is for GPUs: so many tiles are on their way to shared memory at a time, and there is a program for each tile. It is 0
    on an NPU, whose compiler overlaps by itself, and whose programs walk over tiles. (Around the staged loop that walk costs a
    GPU registers: 48 a thread instead of 40.)
    """
    if STAGES:
        gemv_tile(
            tl.program_id(0), x_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, n_rows, n_out, n_in, x_stride,
            BLOCK_N, BLOCK_K, HAS_BIAS, STAGES,
        )  # fmt: skip
    else:
        for tile in range(tl.program_id(0), tl.cdiv(n_out, BLOCK_N) * n_rows, tl.num_programs(0)):
            gemv_tile(
                tile, x_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, n_rows, n_out, n_in, x_stride,
                BLOCK_N, BLOCK_K, HAS_BIAS, STAGES,
            )  # fmt: skip
