"""Weight-only int4 product for a few rows, on the vector cores: one source for NPU and GPU.

Eight weights a word. Word i of a group of GROUP weights holds, in bits 4j ... 4j + 3, weight j * GROUP / 8 + i plus 8: every
nibble plane meets a contiguous part of x, so nothing is shuffled. Nibbles are masked out where they stand; the 16**j they
carry, and the 8, go into x.
"""

import triton
import triton.language as tl


@triton.jit
def four_planes(words, x_tile, mask, eight, N: tl.constexpr, BLOCK_G: tl.constexpr, GROUP: tl.constexpr):
    """Sum over the low four nibbles of every word times the x they meet; eight gathers 8 * x, which is taken off later."""
    WORDS: tl.constexpr = GROUP // 8
    place = tl.arange(0, BLOCK_G)[None, :, None] * GROUP + tl.arange(0, WORDS)[None, None, :]
    place = tl.broadcast_to(place, (N, BLOCK_G, WORDS))
    total = tl.zeros(words.shape, dtype=tl.float32)
    for j in tl.static_range(4):
        x = tl.load(x_tile + j * WORDS + place, mask=mask, other=0.0).to(tl.float32)
        plane = (words & (15 << (4 * j))).to(tl.float32)
        total += plane * (x * (1.0 / (1 << (4 * j))))
        eight += 8.0 * x
    return total, eight


@triton.jit
def all_planes(words, x_tile, mask, N: tl.constexpr, BLOCK_G: tl.constexpr, GROUP: tl.constexpr):
    """Sum over the eight nibbles of every word, less the 8 that each of them is too large. N is 1, or the words' own."""
    WORDS: tl.constexpr = GROUP // 8
    zeros = tl.zeros((N, BLOCK_G, WORDS), dtype=tl.float32)
    low, eight = four_planes(words, x_tile, mask, zeros, N, BLOCK_G, GROUP)
    high, eight = four_planes(words >> 16, x_tile + 4 * WORDS, mask, eight, N, BLOCK_G, GROUP)
    return low + high - eight


# fmt: off
@triton.jit
def gemv_int4_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, n_rows, n_out, n_groups, x_stride,
    BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, SPREAD_X: tl.constexpr,
):
    # fmt: on
    """out[m, n] = sum_g scale[n, g] * sum_i x[m, g, i] * weight[n, g, i] + bias[n], in tiles of BLOCK_N x BLOCK_G groups."""
    WORDS: tl.constexpr = GROUP // 8
    groups = tl.arange(0, BLOCK_G)
    local_n = tl.arange(0, BLOCK_N)
    word = groups[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    for tile in range(tl.program_id(0), tl.cdiv(n_out, BLOCK_N) * n_rows, tl.num_programs(0)):
        block_n = tile // n_rows
        row = tl.cast(tile % n_rows, tl.int64)
        n = block_n * BLOCK_N + local_n
        first = tl.cast(block_n, tl.int64) * BLOCK_N * n_groups
        total = tl.zeros((BLOCK_N, BLOCK_G, WORDS), dtype=tl.float32)
        for start in range(0, n_groups, BLOCK_G):
            in_k = (groups[:, None] < n_groups - start) & (tl.arange(0, WORDS)[None, :] < WORDS)
            mask = in_k[None, :, :] & (n[:, None, None] < n_out)
            tile_ptr = weight_ptr + (first + start) * WORDS
            words = tl.load(
                tile_ptr + (local_n[:, None, None] * (n_groups * WORDS) + word[None, :, :]), mask=mask, other=0
            )
            in_scale = (n[:, None] < n_out) & (groups[None, :] < n_groups - start)
            scale_tile = scale_ptr + first + start + (local_n[:, None] * n_groups + groups[None, :])
            scale = tl.load(scale_tile, mask=in_scale, other=0.0).to(tl.float32)
            x_tile = x_ptr + row * x_stride + start * GROUP
            if SPREAD_X:  # as in gemv_int8
                total += all_planes(words, x_tile, mask, BLOCK_N, BLOCK_G, GROUP) * scale[:, :, None]
            else:
                total += all_planes(words, x_tile, in_k[None, :, :], 1, BLOCK_G, GROUP) * scale[:, :, None]
        in_n = n < n_out
        out = tl.sum(tl.sum(total, axis=2), axis=1)
        if HAS_BIAS:
            out += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * n_out + n, out.to(out_ptr.dtype.element_ty), mask=in_n)
