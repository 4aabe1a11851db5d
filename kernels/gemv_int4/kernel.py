"""Weight-only int4 product for a few rows: one source for NPU and GPU (on a GPU's matrix units: few_rows.py).

Eight weights a word. Word i of a group of GROUP weights holds, in bits 4j ... 4j + 3, weight j * GROUP / 8 + i plus 8: every
nibble plane meets a contiguous part of x, so nothing is shuffled. Nibbles are masked out where they stand; the 16**j they
carry goes into x.
"""

import triton
import triton.language as tl

# An integer below 2**23 read as the bits of an fp32 is that integer times 2**-149, exactly; so bits up to 19 of a word can stay
# where they are. x times 2**64 lifts the products to 2**-85, far from where fp32 loses bits.
LIFT: tl.constexpr = tl.constexpr(2.0**64)
LIFTED: tl.constexpr = tl.constexpr(2.0**-85)
UNLIFT: tl.constexpr = tl.constexpr(2.0**85)


@triton.jit
def four_planes(total, words, x_tile, place, mask, eight, WORDS: tl.constexpr):
    """Add to total the low four nibbles of every word times the x they meet; eight gathers 8 * x, to be taken off."""
    for j in tl.static_range(4):
        x = tl.load(x_tile + j * WORDS + place, mask=mask, other=0.0).to(tl.float32)
        total += (words & (15 << (4 * j))).to(tl.float32) * (x * (1.0 / (1 << (4 * j))))
        eight += 8.0 * x
    return total, eight


# fmt: off
@triton.jit
def group_products(
    x_tile, weight_tile, scale_tile, in_n, local_n, n_groups, left, BLOCK_G: tl.constexpr, GROUP: tl.constexpr,
):
    # fmt: on
    """x * weight of BLOCK_N rows and BLOCK_G groups, of which `left` are there: a sum for every word."""
    WORDS: tl.constexpr = GROUP // 8
    groups, i = tl.arange(0, BLOCK_G), tl.arange(0, WORDS)
    in_k = (groups[:, None] < left) & (i[None, :] < WORDS)
    mask = in_k[None, :, :] & in_n[:, None, None]
    word = groups[:, None] * WORDS + i[None, :]
    words = tl.load(weight_tile + (local_n[:, None, None] * (n_groups * WORDS) + word[None, :, :]), mask=mask, other=0)
    in_scale = in_n[:, None] & (groups[None, :] < left)
    scale = tl.load(scale_tile + (local_n[:, None] * n_groups + groups[None, :]), mask=in_scale, other=0.0).to(tl.float32)
    place, x_mask = (groups[:, None] * GROUP + i[None, :])[None, :, :], in_k[None, :, :]
    eight = tl.zeros((1, BLOCK_G, WORDS), dtype=tl.float32)
    total = tl.zeros(words.shape, dtype=tl.float32)
    total, eight = four_planes(total, words, x_tile, place, x_mask, eight, WORDS)
    total, eight = four_planes(total, words >> 16, x_tile + 4 * WORDS, place, x_mask, eight, WORDS)
    return (total - eight) * scale[:, :, None]


@triton.jit
def four(pack, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Every fourth column [ROWS, COLS] of pack [ROWS, 4 * COLS]; a thread of a GPU holds four neighbours together."""
    even, odd = tl.split(tl.reshape(pack, (ROWS, COLS, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def bits_times(words, x, total, MASK: tl.constexpr):
    """Add masked words, taken for fp32 as they stand, times x: one instruction and a multiply-add a weight."""
    return total + (words & MASK).to(tl.float32, bitcast=True) * x


# fmt: off
@triton.jit
def planes_of_four(
    total, sum_x, words, x_tile, place, mask,
    FIRST: tl.constexpr, STOP: tl.constexpr, DOWN: tl.constexpr, WORDS: tl.constexpr, PACKS: tl.constexpr,
):
    # fmt: on
    """Add the nibbles FIRST ... STOP - 1 of four words, shifted DOWN bits, times the x they meet, and that x to sum_x."""
    first, second, third, fourth = words
    for j in tl.static_range(FIRST, STOP):
        x = tl.load(x_tile + j * WORDS + place, mask=mask, other=0.0).to(tl.float32)[None, :]
        x0, x1, x2, x3 = four(x, 1, PACKS)
        total = bits_times(first, x0 * (LIFT / (1 << (4 * j - DOWN))), total, 15 << (4 * j - DOWN))
        total = bits_times(second, x1 * (LIFT / (1 << (4 * j - DOWN))), total, 15 << (4 * j - DOWN))
        total = bits_times(third, x2 * (LIFT / (1 << (4 * j - DOWN))), total, 15 << (4 * j - DOWN))
        total = bits_times(fourth, x3 * (LIFT / (1 << (4 * j - DOWN))), total, 15 << (4 * j - DOWN))
        sum_x += (x0 + x1) + (x2 + x3)
    return total, sum_x


# fmt: off
@triton.jit
def gpu_products(
    x_tile, weight_tile, scale_tile, in_n, local_n, n_groups, left,
    BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, GROUP: tl.constexpr,
):
    # fmt: on
    """The same on a GPU, a sum for every four words, times LIFTED. Words of all groups in one axis: so a warp reads a row."""
    WORDS: tl.constexpr = GROUP // 8
    PACKS: tl.constexpr = BLOCK_G * WORDS // 4
    word = tl.arange(0, BLOCK_G * WORDS)
    in_k = word < left * WORDS
    mask = in_n[:, None] & in_k[None, :]
    words = tl.load(weight_tile + (local_n[:, None] * (n_groups * WORDS) + word[None, :]), mask=mask, other=0)
    first, second, third, fourth = four(words, BLOCK_N, PACKS)
    group = tl.arange(0, BLOCK_G)[None, :]
    in_scale = in_n[:, None] & (group < left)
    scale = tl.load(scale_tile + (local_n[:, None] * n_groups + group), mask=in_scale, other=0.0).to(tl.float32)
    scale = tl.reshape(tl.broadcast_to(scale[:, :, None], (BLOCK_N, BLOCK_G, WORDS // 4)), (BLOCK_N, PACKS))
    place = word // WORDS * GROUP + word % WORDS
    sum_x = tl.zeros((1, PACKS), dtype=tl.float32)
    total = tl.zeros((BLOCK_N, PACKS), dtype=tl.float32)
    words = (first, second, third, fourth)
    total, sum_x = planes_of_four(total, sum_x, words, x_tile, place, in_k, 0, 5, 0, WORDS, PACKS)
    words = (first >> 16, second >> 16, third >> 16, fourth >> 16)
    total, sum_x = planes_of_four(total, sum_x, words, x_tile, place, in_k, 5, 8, 16, WORDS, PACKS)
    return (total - sum_x * (8.0 * LIFTED)) * scale


# fmt: off
@triton.jit
def gemv_tile(
    tile, x_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, n_rows, n_out, n_groups, x_stride,
    BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, STAGES: tl.constexpr,
):
    # fmt: on
    """BLOCK_N results of one row of x."""
    WORDS: tl.constexpr = GROUP // 8
    local_n = tl.arange(0, BLOCK_N)
    block_n = tile // n_rows
    row = tl.cast(tile % n_rows, tl.int64)
    n = block_n * BLOCK_N + local_n
    in_n = n < n_out
    first = tl.cast(block_n, tl.int64) * BLOCK_N * n_groups
    x_row = x_ptr + row * x_stride
    if STAGES:
        total = tl.zeros((BLOCK_N, BLOCK_G * WORDS // 4), dtype=tl.float32)
        for start in tl.range(0, n_groups, BLOCK_G, num_stages=STAGES):
            total += gpu_products(
                x_row + start * GROUP, weight_ptr + (first + start) * WORDS, scale_ptr + first + start, in_n, local_n,
                n_groups, n_groups - start, BLOCK_N, BLOCK_G, GROUP,
            )  # fmt: skip
        out = tl.sum(total, axis=1) * UNLIFT
    else:
        total = tl.zeros((BLOCK_N, BLOCK_G, WORDS), dtype=tl.float32)
        for start in range(0, n_groups, BLOCK_G):
            total += group_products(
                x_row + start * GROUP, weight_ptr + (first + start) * WORDS, scale_ptr + first + start, in_n, local_n,
                n_groups, n_groups - start, BLOCK_G, GROUP,
            )  # fmt: skip
        out = tl.sum(tl.sum(total, axis=2), axis=1)
    if HAS_BIAS:
        out += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * n_out + n, out.to(out_ptr.dtype.element_ty), mask=in_n)


# fmt: off
@triton.jit
def gemv_int4_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, n_rows, n_out, n_groups, x_stride,
    BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, STAGES: tl.constexpr,
):
    # fmt: on
    """out[m, n] = sum_g scale[n, g] * sum_i x[m, g, i] * weight[n, g, i] + bias[n], in tiles of BLOCK_N x BLOCK_G groups.

    STAGES as in gemv_int8: 0 on an NPU, whose programs walk over tiles. A GPU has a program for each.
    """
    if STAGES:
        gemv_tile(
            tl.program_id(0), x_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, n_rows, n_out, n_groups, x_stride,
            BLOCK_N, BLOCK_G, GROUP, HAS_BIAS, STAGES,
        )  # fmt: skip
    else:
        for tile in range(tl.program_id(0), tl.cdiv(n_out, BLOCK_N) * n_rows, tl.num_programs(0)):
            gemv_tile(
                tile, x_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, n_rows, n_out, n_groups, x_stride,
                BLOCK_N, BLOCK_G, GROUP, HAS_BIAS, STAGES,
            )  # fmt: skip
