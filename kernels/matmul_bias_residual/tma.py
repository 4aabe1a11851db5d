"""The product for many rows, on a GPU that copies whole tiles by itself (Hopper's TMA): no addresses or masks in the loop.

No NPU runs it: its programs do not walk over tiles, which around this loop costs a GPU registers too.
"""

import triton
import triton.language as tl

from qcompile.kernels.matmul_bias_residual.kernel import tile_of


# fmt: off
@triton.jit
def addends(
    bias_ptr, residual_tile, local_m, n, mask, n_out, residual_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):
    # fmt: on
    """What is added to the product, [BLOCK_M, BLOCK_N] in fp32."""
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=n < n_out, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        place = local_m[:, None] * residual_stride + n[None, :]
        total += tl.load(residual_tile + place, mask=mask, other=0.0).to(tl.float32)
    return total


# fmt: off
@triton.jit
def matmul_tma_kernel(
    x, weight, bias_ptr, residual, out, n_rows, n_out, n_in, residual_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SPLITS: tl.constexpr,
    PDL: tl.constexpr, AFTER: tl.constexpr, LATE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):
    # fmt: on
    """A tile of out, or, with SPLITS above 1, the partial sum that is program_id(1)'s of a tile, as in split.py.

    x and weight are descriptors of [BLOCK_M, BLOCK_K] and [BLOCK_N, BLOCK_K]; past their ends they give 0. Bias and residual
    are added before the product: they come from memory while its first tiles do. With LATE they are added after it, and
    residual and out are descriptors of [BLOCK_M, BLOCK_N] as well: of two programs on a multiprocessor one multiplies
    meanwhile. PDL lets the next kernel start before this
    one has ended; AFTER is for one that did, with other rows, and must not end before the one before it.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    block_m, block_n = tile_of(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.cdiv(n_out, BLOCK_N), GROUP_M)
    split, n_steps = tl.program_id(1), tl.cdiv(n_in, BLOCK_K)
    local_m = tl.arange(0, BLOCK_M)
    first, m, n = tl.cast(block_m, tl.int64) * BLOCK_M, block_m * BLOCK_M + local_m, block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (m[:, None] < n_rows) & (n[None, :] < n_out)
    if LATE:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    else:
        total = addends(
            bias_ptr, residual + first * residual_stride, local_m, n, mask, n_out, residual_stride, BLOCK_M, BLOCK_N,
            HAS_BIAS, HAS_RESIDUAL,
        )  # fmt: skip
    for step in range(split * n_steps // SPLITS, (split + 1) * n_steps // SPLITS):
        x_tile = x.load([block_m * BLOCK_M, step * BLOCK_K])
        weight_tile = weight.load([block_n * BLOCK_N, step * BLOCK_K])
        total = tl.dot(x_tile, weight_tile.T, total, input_precision="ieee")
    if LATE:
        if HAS_BIAS:
            total += tl.load(bias_ptr + n, mask=n < n_out, other=0.0).to(tl.float32)[None, :]
        if HAS_RESIDUAL:
            total += residual.load([block_m * BLOCK_M, block_n * BLOCK_N]).to(tl.float32)
        out.store([block_m * BLOCK_M, block_n * BLOCK_N], total.to(out.dtype))
    else:
        out_tile = out + (tl.cast(split, tl.int64) * n_rows + first) * n_out
        tl.store(out_tile + (local_m[:, None] * n_out + n[None, :]), total.to(out.dtype.element_ty), mask=mask)
    if AFTER:
        tl.extra.cuda.gdc_wait()
