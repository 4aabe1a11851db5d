"""The int8 product on a GPU's matrix units, which read the weights once for one row or several; no NPU runs it."""

import triton
import triton.language as tl

# Four int8 to four fp16. A byte of 0 ... 255 below the exponent of 1024 makes 1024 + b, exactly; b is the weight plus 128.
FP16_OF_BYTES: tl.constexpr = tl.constexpr("""
{
.reg .b32 bytes, magic, off;
mov.b32 magic, 0x64646464;
mov.b32 off, 0xE480E480;
xor.b32 bytes, $2, 0x80808080;
prmt.b32 $0, bytes, magic, 0x4140;
prmt.b32 $1, bytes, magic, 0x4342;
add.rn.f16x2 $0, $0, off;
add.rn.f16x2 $1, $1, off;
}
""")


@triton.jit
def widened(weight, dtype: tl.constexpr, PTX: tl.constexpr):
    """Weights in the dtype of x; PTX says the same for fp16 without conversions, of which a GPU does few at a time."""
    if PTX:
        return tl.inline_asm_elementwise(FP16_OF_BYTES, "=&r,=&r,r", [weight], dtype=tl.float16, is_pure=True, pack=4)
    else:
        return weight.to(dtype)


# fmt: off
@triton.jit
def columns_of_x(
    x_ptr, left, n_rows, x_stride, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, COLS: tl.constexpr,
    EVEN: tl.constexpr,
):
    # fmt: on
    """x [PARTS, BLOCK_K, COLS] of PARTS * BLOCK_K columns, of which `left` are there.

    One row, BLOCK_M of 1, is copied to shared memory as it lies and repeated only in registers (as in gemv_int4): as eight
    columns of fp16 it would fill as much of that memory as 16 rows of weights do.
    """
    k = tl.arange(0, PARTS)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    if BLOCK_M == 1:
        x = tl.load(x_ptr + k) if EVEN else tl.load(x_ptr + k, mask=k < left, other=0.0)
        x = tl.broadcast_to(x[:, :, None], (PARTS, BLOCK_K, COLS))
    else:
        m = tl.arange(0, COLS)[None, None, :]
        x = tl.load(x_ptr + (m * x_stride + k[:, :, None]), mask=(k[:, :, None] < left) & (m < n_rows), other=0.0)
    return x


# fmt: off
@triton.jit
def gemv_int8_rows_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, n_rows, n_out, n_in, x_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr,
    PTX: tl.constexpr, EVEN: tl.constexpr,
):
    # fmt: on
    """out[m, n] = scale[n] * sum_k x[m, k] * weight[n, k] + bias[n] for BLOCK_N of n and up to BLOCK_M rows m.

    A batched product: each of PARTS warps has its own slice of K, and the slices are summed once at the end. With BLOCK_N rows
    of weights alone the few programs would have too few bytes on their way. EVEN: all tiles are whole, and no load has a mask.
    """
    COLS: tl.constexpr = BLOCK_M if BLOCK_M > 8 else 8  # of the matrix instruction
    part, k = tl.arange(0, PARTS)[:, None, None], tl.arange(0, BLOCK_K)
    m, local_n = tl.arange(0, COLS), tl.arange(0, BLOCK_N)
    n = tl.program_id(0) * BLOCK_N + local_n
    in_n = n < n_out
    weight_tile = weight_ptr + tl.cast(tl.program_id(0), tl.int64) * BLOCK_N * n_in
    weight_k = part * BLOCK_K + k[None, None, :]
    place = local_n[None, :, None] * n_in + weight_k
    total = tl.zeros((PARTS, BLOCK_N, COLS), dtype=tl.float32)
    for start in range(0, n_in, BLOCK_K * PARTS):
        left = n_in - start
        if EVEN:
            weight = tl.load(weight_tile + start + place)
        else:
            weight = tl.load(weight_tile + start + place, mask=(weight_k < left) & in_n[None, :, None], other=0)
        x = columns_of_x(x_ptr + start, left, n_rows, x_stride, BLOCK_M, BLOCK_K, PARTS, COLS, EVEN)
        total = tl.dot(widened(weight, x.dtype, PTX), x, total, input_precision="ieee")
    out = tl.sum(total, axis=0) * tl.load(scale_ptr + n, mask=in_n, other=0.0)[:, None]
    if HAS_BIAS:
        out += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[:, None]
    mask = in_n[:, None] & (m[None, :] < n_rows)
    tl.store(out_ptr + (m[None, :] * n_out + n[:, None]), out.to(out_ptr.dtype.element_ty), mask=mask)
