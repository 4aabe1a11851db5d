"""Weight-only int4 product for a few rows: one source for NPU and GPU, and one more for several rows on a GPU.

Eight weights a word. Word i of a group of GROUP weights holds, in bits 4j ... 4j + 3, weight j * GROUP / 8 + i plus 8: every
nibble plane meets a contiguous part of x, so nothing is shuffled. Nibbles are masked out where they stand; the 16**j they
carry goes into x.
"""

import triton
import triton.language as tl

# fp32 of 2**23 with a small integer in its last bits is 2**23 plus that integer
TWO_23_BITS: tl.constexpr = tl.constexpr(0x4B000000)
TWO_23: tl.constexpr = tl.constexpr(8388608.0)


@triton.jit
def plane(words, j: tl.constexpr, AS_BITS: tl.constexpr):
    """16**j * weight of nibble j < 4 in fp32, and what it is too large by.

    AS_BITS is for GPUs: the nibble is put among the bits of an fp32 and 2**23 taken off, two instructions of the widest
    units instead of a conversion. An NPU converts, and takes the 8 off later.
    """
    nibble = words & (15 << (4 * j))
    if AS_BITS:
        return (nibble | TWO_23_BITS).to(tl.float32, bitcast=True) - (TWO_23 + 8.0 * (1 << (4 * j)))
    else:
        return nibble.to(tl.float32)


@triton.jit
def four_planes(total, words, x_tile, place, mask, eight, WORDS: tl.constexpr, AS_BITS: tl.constexpr):
    """Add to total the low four nibbles of every word times the x they meet; eight gathers 8 * x, to be taken off (NPU)."""
    for j in tl.static_range(4):
        x = tl.load(x_tile + j * WORDS + place, mask=mask, other=0.0).to(tl.float32)
        total += plane(words, j, AS_BITS) * (x * (1.0 / (1 << (4 * j))))
        if not AS_BITS:
            eight += 8.0 * x
    return total, eight


@triton.jit
def all_planes(words, x_tile, mask, BLOCK_G: tl.constexpr, GROUP: tl.constexpr, AS_BITS: tl.constexpr):
    """Sum over the eight weights of every word times the x they meet."""
    WORDS: tl.constexpr = GROUP // 8
    place = tl.arange(0, BLOCK_G)[None, :, None] * GROUP + tl.arange(0, WORDS)[None, None, :]
    eight = tl.zeros((1, BLOCK_G, WORDS), dtype=tl.float32)
    total = tl.zeros(words.shape, dtype=tl.float32)
    total, eight = four_planes(total, words, x_tile, place, mask, eight, WORDS, AS_BITS)
    total, eight = four_planes(total, words >> 16, x_tile + 4 * WORDS, place, mask, eight, WORDS, AS_BITS)
    return total if AS_BITS else total - eight


# fmt: off
@triton.jit
def group_products(
    x_tile, weight_tile, scale_tile, in_n, local_n, n_groups, left,
    BLOCK_G: tl.constexpr, GROUP: tl.constexpr, AS_BITS: tl.constexpr,
):
    # fmt: on
    """x * weight of BLOCK_N rows and BLOCK_G groups, of which `left` are there: a sum for every word."""
    WORDS: tl.constexpr = GROUP // 8
    groups = tl.arange(0, BLOCK_G)
    word = groups[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    in_k = (groups[:, None] < left) & (tl.arange(0, WORDS)[None, :] < WORDS)
    mask = in_k[None, :, :] & in_n[:, None, None]
    words = tl.load(weight_tile + (local_n[:, None, None] * (n_groups * WORDS) + word[None, :, :]), mask=mask, other=0)
    in_scale = in_n[:, None] & (groups[None, :] < left)
    scale = tl.load(scale_tile + (local_n[:, None] * n_groups + groups[None, :]), mask=in_scale, other=0.0).to(tl.float32)
    return all_planes(words, x_tile, in_k[None, :, :], BLOCK_G, GROUP, AS_BITS) * scale[:, :, None]


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
    total = tl.zeros((BLOCK_N, BLOCK_G, WORDS), dtype=tl.float32)
    if STAGES:
        for start in tl.range(0, n_groups, BLOCK_G, num_stages=STAGES):
            total += group_products(
                x_row + start * GROUP, weight_ptr + (first + start) * WORDS, scale_ptr + first + start, in_n, local_n,
                n_groups, n_groups - start, BLOCK_G, GROUP, True,
            )  # fmt: skip
    else:
        for start in range(0, n_groups, BLOCK_G):
            total += group_products(
                x_row + start * GROUP, weight_ptr + (first + start) * WORDS, scale_ptr + first + start, in_n, local_n,
                n_groups, n_groups - start, BLOCK_G, GROUP, False,
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


# fmt: off
@triton.jit
def gemv_int4_rows_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, n_rows, n_out, n_groups, x_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr,
):
    # fmt: on
    """The same for up to BLOCK_M rows at once, on a GPU's matrix units: one group a warp, summed at the end."""
    WORDS: tl.constexpr = GROUP // 8
    groups, i = tl.arange(0, BLOCK_G), tl.arange(0, WORDS)
    m, local_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    n = tl.program_id(0) * BLOCK_N + local_n
    in_n = n < n_out
    first = tl.cast(tl.program_id(0), tl.int64) * BLOCK_N * n_groups
    word = local_n[None, :, None] * (n_groups * WORDS) + groups[:, None, None] * WORDS + i[None, None, :]
    x_place = m[None, None, :] * x_stride + groups[:, None, None] * GROUP + i[None, :, None]
    total = tl.zeros((BLOCK_G, BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in range(0, n_groups, BLOCK_G):
        in_k = groups < n_groups - start
        mask = in_k[:, None, None] & in_n[None, :, None]
        words = tl.load(weight_ptr + (first + start) * WORDS + word, mask=mask, other=0)
        scale_place = local_n[None, :] * n_groups + groups[:, None]
        scale_mask = in_k[:, None] & in_n[None, :]
        scale = tl.load(scale_ptr + first + start + scale_place, mask=scale_mask, other=0.0).to(tl.float32)
        x_mask = in_k[:, None, None] & (m[None, None, :] < n_rows)
        part = tl.zeros((BLOCK_G, BLOCK_N, BLOCK_M), dtype=tl.float32)
        for j in tl.static_range(8):
            x = tl.load(x_ptr + start * GROUP + j * WORDS + x_place, mask=x_mask, other=0.0)
            part = tl.dot((((words >> (4 * j)) & 15) - 8).to(x.dtype), x, part, input_precision="ieee")
        total += part * scale[:, :, None]
    out = tl.sum(total, axis=0)
    if HAS_BIAS:
        out += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[:, None]
    tl.store(
        out_ptr + (m[None, :] * n_out + n[:, None]),
        out.to(out_ptr.dtype.element_ty),
        mask=in_n[:, None] & (m[None, :] < n_rows),
    )
