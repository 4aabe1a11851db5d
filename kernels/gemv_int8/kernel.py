"""Weight-only int8 product for a few rows, on the vector cores: one source for NPU and GPU.

No tl.dot: Ascend's cube core takes no int8 weights beside fp16 activations, so the compiler would write the widened weights to
memory and read them again, which is the traffic that int8 is to save.
"""

import triton
import triton.language as tl


@triton.jit
def gemv_int8_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    n_rows,
    n_out,
    n_in,
    x_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPREAD_X: tl.constexpr,
):
    """out[m, n] = scale[n] * sum_k x[m, k] * weight[n, k] + bias[n].

    Rows m of one n-block follow each other: they share the weights in the cache. SPREAD_X is for GPUs: every thread loads the
    x it needs (from the first-level cache), so that the threads need not exchange it through shared memory, with barriers.
    """
    k = tl.arange(0, BLOCK_K)[None, :]
    local_n = tl.arange(0, BLOCK_N)
    for tile in range(tl.program_id(0), tl.cdiv(n_out, BLOCK_N) * n_rows, tl.num_programs(0)):
        block_n = tile // n_rows
        row = tl.cast(tile % n_rows, tl.int64)
        n = block_n * BLOCK_N + local_n
        weight_tile = weight_ptr + tl.cast(block_n, tl.int64) * BLOCK_N * n_in
        total = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        for start in range(0, n_in, BLOCK_K):
            in_k = k < n_in - start
            mask = in_k & (n[:, None] < n_out)
            weight = tl.load(weight_tile + start + (local_n[:, None] * n_in + k), mask=mask, other=0)
            x_tile = x_ptr + row * x_stride + start
            if SPREAD_X:
                x = tl.load(x_tile + tl.broadcast_to(k, (BLOCK_N, BLOCK_K)), mask=mask, other=0.0)
            else:
                x = tl.load(x_tile + k, mask=in_k, other=0.0)
            total += weight.to(tl.float32) * x.to(tl.float32)
        in_n = n < n_out
        out = tl.sum(total, axis=1) * tl.load(scale_ptr + n, mask=in_n, other=0.0).to(tl.float32)
        if HAS_BIAS:
            out += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * n_out + n, out.to(out_ptr.dtype.element_ty), mask=in_n)
