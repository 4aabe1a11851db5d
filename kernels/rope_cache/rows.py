"""rope_cache on a GPU: the heads of all tokens are rows of one list, so that no lane idles where a token has few.

No NPU runs it: there each row's token is a division of vectors, and programs walk over tiles.
"""

import triton
import triton.language as tl


@triton.jit
def rotate_rows(in_ptr, heads, out_ptr, outs, cos_ptr, sin_ptr, angles, in_mask, out_mask, HALF: tl.constexpr):
    """out = in * cos + rotate_half(in) * sin; heads, outs and angles are where the rows begin, int64 [rows], like the masks."""
    d = tl.arange(0, HALF)[None, :]
    heads, outs, angles = heads[:, None] + d, outs[:, None] + d, angles[:, None] + d
    in_mask, out_mask = in_mask[:, None], out_mask[:, None]
    low = tl.load(in_ptr + heads, mask=in_mask, other=0.0)
    high = tl.load(in_ptr + HALF + heads, mask=in_mask, other=0.0)
    cos = tl.load(cos_ptr + angles, mask=in_mask, other=0.0)
    sin = tl.load(sin_ptr + angles, mask=in_mask, other=0.0)
    a, b = low.to(tl.float32), high.to(tl.float32)
    tl.store(out_ptr + outs, (a * cos - b * sin).to(low.dtype), mask=out_mask)
    tl.store(out_ptr + HALF + outs, (b * cos + a * sin).to(low.dtype), mask=out_mask)


# fmt: off
@triton.jit
def rope_cache_rows_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, position_ptr, slot_ptr, q_out_ptr, k_cache_ptr, v_cache_ptr,
    n_tokens, tokens_per_row, n_heads, n_kv_heads, q_stride, k_stride, v_stride,
    cache_batch_stride, cache_head_stride, cache_slot_stride,
    BLOCK_ROWS: tl.constexpr, HALF: tl.constexpr,
):
    # fmt: on
    """As rope_cache_kernel. The first programs have BLOCK_ROWS query heads each, the others as many key heads with values."""
    tile = tl.program_id(0)
    q_tiles = tl.cdiv(n_tokens * n_heads, BLOCK_ROWS)
    lanes = tl.arange(0, BLOCK_ROWS)
    if tile < q_tiles:
        row = tile * BLOCK_ROWS + lanes
        mask = row < n_tokens * n_heads
        token = row // n_heads
        position = tl.load(position_ptr + token, mask=mask, other=0).to(tl.int64) * HALF
        heads = token.to(tl.int64) * q_stride + row % n_heads * 2 * HALF
        rotate_rows(
            q_ptr, heads, q_out_ptr, row.to(tl.int64) * 2 * HALF, cos_ptr, sin_ptr, position, mask, mask, HALF
        )
    else:
        row = (tile - q_tiles) * BLOCK_ROWS + lanes
        mask = row < n_tokens * n_kv_heads
        token, head = row // n_kv_heads, row % n_kv_heads
        wide = token.to(tl.int64)
        slot = tl.load(slot_ptr + token, mask=mask, other=-1)
        position = tl.load(position_ptr + token, mask=mask, other=0).to(tl.int64) * HALF
        d = tl.arange(0, 2 * HALF)[None, :]
        heads = wide * v_stride + head * 2 * HALF
        values = tl.load(v_ptr + (heads[:, None] + d), mask=mask[:, None], other=0.0)
        cache = (token // tokens_per_row).to(tl.int64) * cache_batch_stride
        cache += head.to(tl.int64) * cache_head_stride + slot.to(tl.int64) * cache_slot_stride
        heads = wide * k_stride + head * 2 * HALF
        rotate_rows(k_ptr, heads, k_cache_ptr, cache, cos_ptr, sin_ptr, position, mask, slot >= 0, HALF)
        tl.store(v_cache_ptr + (cache[:, None] + d), values, mask=(slot >= 0)[:, None])
