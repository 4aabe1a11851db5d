"""The int4 product on a GPU's matrix units, for one row of x or up to 16, in slices of K where N is small; no NPU runs it.

A program has BLOCK_N rows of weights, a warp of it one group of every BLOCK_G; the groups are summed once at the end. Nibbles
become fp16 or bf16 two at a time (`planes`), in 1.25 or 1.5 instructions a weight, and are the left operand, of which the
matrix instruction takes 16 rows; of the right one, x, 8 columns are enough.
"""

import triton
import triton.language as tl

# Two words (a, b) to the eight pairs (nibble j of a, nibble j of b), less 8. A nibble among the lowest bits of an fp16 of 1024
# makes that 1024 + q; four places up, 1024 + 16 q. One addition, or multiply-add, leaves q - 8, exactly.
FP16_PLANES: tl.constexpr = tl.constexpr("""
{
.reg .b32 low, high, low8, high8, magic, off, off16, part;
mov.b32 magic, 0x64006400;
mov.b32 off, 0xE408E408;
mov.b32 off16, 0xD480D480;
mov.b32 part, 0x2C002C00;
prmt.b32 low, $8, $9, 0x5410;
prmt.b32 high, $8, $9, 0x7632;
shr.u32 low8, low, 8;
shr.u32 high8, high, 8;
lop3.b32 $0, low, 0x000F000F, magic, 0xEA;
lop3.b32 $1, low, 0x00F000F0, magic, 0xEA;
lop3.b32 $2, low8, 0x000F000F, magic, 0xEA;
lop3.b32 $3, low8, 0x00F000F0, magic, 0xEA;
lop3.b32 $4, high, 0x000F000F, magic, 0xEA;
lop3.b32 $5, high, 0x00F000F0, magic, 0xEA;
lop3.b32 $6, high8, 0x000F000F, magic, 0xEA;
lop3.b32 $7, high8, 0x00F000F0, magic, 0xEA;
add.rn.f16x2 $0, $0, off;
fma.rn.f16x2 $1, $1, part, off16;
add.rn.f16x2 $2, $2, off;
fma.rn.f16x2 $3, $3, part, off16;
add.rn.f16x2 $4, $4, off;
fma.rn.f16x2 $5, $5, part, off16;
add.rn.f16x2 $6, $6, off;
fma.rn.f16x2 $7, $7, part, off16;
}
""")
# The same in bf16, where only 128 + q fits: its fraction has seven bits.
BF16_PLANES: tl.constexpr = tl.constexpr("""
{
.reg .b32 low, high, low4, high4, low8, high8, low12, high12, magic, off;
mov.b32 magic, 0x43004300;
mov.b32 off, 0xC308C308;
prmt.b32 low, $8, $9, 0x5410;
prmt.b32 high, $8, $9, 0x7632;
shr.u32 low4, low, 4;
shr.u32 low8, low, 8;
shr.u32 low12, low, 12;
shr.u32 high4, high, 4;
shr.u32 high8, high, 8;
shr.u32 high12, high, 12;
lop3.b32 $0, low, 0x000F000F, magic, 0xEA;
lop3.b32 $1, low4, 0x000F000F, magic, 0xEA;
lop3.b32 $2, low8, 0x000F000F, magic, 0xEA;
lop3.b32 $3, low12, 0x000F000F, magic, 0xEA;
lop3.b32 $4, high, 0x000F000F, magic, 0xEA;
lop3.b32 $5, high4, 0x000F000F, magic, 0xEA;
lop3.b32 $6, high8, 0x000F000F, magic, 0xEA;
lop3.b32 $7, high12, 0x000F000F, magic, 0xEA;
add.rn.bf16x2 $0, $0, off;
add.rn.bf16x2 $1, $1, off;
add.rn.bf16x2 $2, $2, off;
add.rn.bf16x2 $3, $3, off;
add.rn.bf16x2 $4, $4, off;
add.rn.bf16x2 $5, $5, off;
add.rn.bf16x2 $6, $6, off;
add.rn.bf16x2 $7, $7, off;
}
""")


@triton.jit
def plane(words, j: tl.constexpr, dtype: tl.constexpr):
    """Nibble j of every word, less 8."""
    return (((words >> (4 * j)) & 15) - 8).to(dtype)


@triton.jit
def planes(words, dtype: tl.constexpr, PTX: tl.constexpr):
    """The eight nibbles of every word, less 8; PTX says the same in a third of the instructions."""
    if PTX:
        return tl.inline_asm_elementwise(
            FP16_PLANES if dtype == tl.float16 else BF16_PLANES, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r", [words],
            dtype=(dtype.value, dtype.value, dtype.value, dtype.value, dtype.value, dtype.value, dtype.value, dtype.value),
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return (
            plane(words, 0, dtype), plane(words, 1, dtype), plane(words, 2, dtype), plane(words, 3, dtype),
            plane(words, 4, dtype), plane(words, 5, dtype), plane(words, 6, dtype), plane(words, 7, dtype),
        )  # fmt: skip


@triton.jit
def planes_of_x(x, BLOCK_G: tl.constexpr, WORDS: tl.constexpr):
    """The eight parts [BLOCK_G, WORDS, 1] of one row x [BLOCK_G, 8 * WORDS] that the nibble planes meet."""
    x = tl.permute(tl.reshape(x, (BLOCK_G, 2, 2, 2, WORDS, 1)), (0, 4, 5, 3, 2, 1))
    low, high = tl.split(x)
    low_low, low_high = tl.split(low)
    high_low, high_high = tl.split(high)
    first, second = tl.split(low_low)
    third, fourth = tl.split(low_high)
    fifth, sixth = tl.split(high_low)
    seventh, eighth = tl.split(high_high)
    return first, second, third, fourth, fifth, sixth, seventh, eighth


# fmt: off
@triton.jit
def group_dots(
    weights, x_ptr, n_rows, left, x_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, GROUP: tl.constexpr, COLS: tl.constexpr,
):
    # fmt: on
    """The products [BLOCK_G, BLOCK_N, COLS] of BLOCK_G groups, of which `left` are there: weights are the eight nibble planes.

    One row, BLOCK_M of 1, is copied to shared memory as it lies, once for all planes, and repeated only in registers: as eight
    columns for each plane it would fill as much of that memory as the weights do.
    """
    WORDS: tl.constexpr = GROUP // 8
    groups, i, m = tl.arange(0, BLOCK_G), tl.arange(0, WORDS), tl.arange(0, COLS)
    part = tl.zeros((BLOCK_G, BLOCK_N, COLS), dtype=tl.float32)
    if BLOCK_M == 1:
        place = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        parts = planes_of_x(tl.load(x_ptr + place, mask=groups[:, None] < left, other=0.0), BLOCK_G, WORDS)
        for j in tl.static_range(8):
            x = tl.broadcast_to(parts[j], (BLOCK_G, WORDS, COLS))
            part = tl.dot(weights[j], x, part, input_precision="ieee")
    else:
        place = m[None, None, :] * x_stride + groups[:, None, None] * GROUP + i[None, :, None]
        mask = (groups[:, None, None] < left) & (m[None, None, :] < n_rows)
        for j in tl.static_range(8):
            x = tl.load(x_ptr + j * WORDS + place, mask=mask, other=0.0)
            part = tl.dot(weights[j], x, part, input_precision="ieee")
    return part


# fmt: off
@triton.jit
def gemv_int4_dot_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, n_rows, n_out, n_groups, x_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr,
    PTX: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):
    # fmt: on
    """out[m, n] = sum_g scale[n, g] * sum_i x[m, g, i] * weight[n, g, i] + bias[n] for BLOCK_N of n and all m.

    With SPLITS above 1 out is [SPLITS, n_rows, n_out] in fp32: partial sums over the whole BLOCK_Gs that are program_id(1)'s,
    perhaps none. PDL lets the kernel that adds them start early.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    WORDS: tl.constexpr = GROUP // 8
    COLS: tl.constexpr = BLOCK_M if BLOCK_M > 8 else 8  # of the matrix instruction
    groups, word = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_G * WORDS)
    m, local_n = tl.arange(0, COLS), tl.arange(0, BLOCK_N)
    n = tl.program_id(0) * BLOCK_N + local_n
    in_n = n < n_out
    split, n_steps = tl.program_id(1), tl.cdiv(n_groups, BLOCK_G)
    begin, end = split * n_steps // SPLITS * BLOCK_G, (split + 1) * n_steps // SPLITS * BLOCK_G
    first = tl.cast(tl.program_id(0), tl.int64) * BLOCK_N * n_groups
    word_place = local_n[:, None] * (n_groups * WORDS) + word[None, :]
    scale_place = local_n[None, :] * n_groups + groups[:, None]
    in_scale = (groups[:, None] < n_groups - begin) & in_n[None, :]
    scale = tl.load(scale_ptr + first + begin + scale_place, mask=in_scale, other=0.0)
    total = tl.zeros((BLOCK_G, BLOCK_N, COLS), dtype=tl.float32)
    for start in range(begin, end, BLOCK_G):
        in_word = in_n[:, None] & (word < (n_groups - start) * WORDS)[None, :]
        words = tl.load(weight_ptr + (first + start) * WORDS + word_place, mask=in_word, other=0)
        words = tl.permute(tl.reshape(words, (BLOCK_N, BLOCK_G, WORDS)), (1, 0, 2))
        scale_now, after = scale.to(tl.float32), start + BLOCK_G  # loaded a turn ahead: it is not staged as words and x are
        in_scale = (groups[:, None] < n_groups - after) & in_n[None, :]
        scale = tl.load(scale_ptr + first + after + scale_place, mask=in_scale, other=0.0)
        weights = planes(words, x_ptr.dtype.element_ty, PTX)
        part = group_dots(
            weights, x_ptr + start * GROUP, n_rows, n_groups - start, x_stride, BLOCK_M, BLOCK_N, BLOCK_G, GROUP, COLS
        )
        total += part * scale_now[:, :, None]
    out = tl.sum(total, axis=0)
    if HAS_BIAS:
        out += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[:, None]
    mask = in_n[:, None] & (m[None, :] < n_rows)
    out_tile = out_ptr + tl.cast(split, tl.int64) * n_rows * n_out
    tl.store(out_tile + (m[None, :] * n_out + n[:, None]), out.to(out_ptr.dtype.element_ty), mask=mask)
