"""Rotate queries and keys, write keys and values into the KV cache, as an NPU wants it; a GPU has rows.py."""

import triton
import triton.language as tl


@triton.jit
def rotate_heads(in_ptr, out_ptr, head_stride, cos, sin, first, n_heads, BLOCK_HEADS: tl.constexpr, HALF: tl.constexpr):
    """out = in * cos + rotate_half(in) * sin for heads first ... first + BLOCK_HEADS of one token."""
    heads = first + tl.arange(0, BLOCK_HEADS)[:, None]
    d = tl.arange(0, HALF)[None, :]
    mask = (heads < n_heads) & (d < HALF)
    low = tl.load(in_ptr + (heads * 2 * HALF + d), mask=mask, other=0.0)
    high = tl.load(in_ptr + (heads * 2 * HALF + HALF + d), mask=mask, other=0.0)
    a, b = low.to(tl.float32), high.to(tl.float32)
    out = heads * head_stride + d
    tl.store(out_ptr + out, (a * cos - b * sin).to(low.dtype), mask=mask)
    tl.store(out_ptr + HALF + out, (b * cos + a * sin).to(low.dtype), mask=mask)


@triton.jit
def copy_heads(in_ptr, out_ptr, head_stride, first, n_heads, BLOCK_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Copy heads first ... first + BLOCK_HEADS of one token."""
    heads = first + tl.arange(0, BLOCK_HEADS)[:, None]
    d = tl.arange(0, HEAD_DIM)[None, :]
    mask = (heads < n_heads) & (d < HEAD_DIM)
    values = tl.load(in_ptr + (heads * HEAD_DIM + d), mask=mask, other=0.0)
    tl.store(out_ptr + (heads * head_stride + d), values, mask=mask)


# fmt: off
@triton.jit
def rope_cache_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, position_ptr, slot_ptr, q_out_ptr, k_cache_ptr, v_cache_ptr,
    n_tokens, tokens_per_row, n_heads, n_kv_heads, q_stride, k_stride, v_stride,
    cache_batch_stride, cache_head_stride, cache_slot_stride,
    BLOCK_HEADS: tl.constexpr, HALF: tl.constexpr,
):
    # fmt: on
    """Token t of batch row t // tokens_per_row: q rotated to q_out; k rotated, and v, to slot slot[t] of the row's cache.

    A tile is one token and one of: BLOCK_HEADS query heads, BLOCK_HEADS key heads with their values. Slots below 0 are
    skipped (padding).
    """
    d = tl.arange(0, HALF)[None, :]
    q_groups = tl.cdiv(n_heads, BLOCK_HEADS)
    groups = q_groups + tl.cdiv(n_kv_heads, BLOCK_HEADS)
    for tile in range(tl.program_id(0), n_tokens * groups, tl.num_programs(0)):
        token = tile // groups
        group = tile % groups
        wide = tl.cast(token, tl.int64)
        position = tl.cast(tl.load(position_ptr + token), tl.int64)
        cos = tl.load(cos_ptr + position * HALF + d).to(tl.float32)
        sin = tl.load(sin_ptr + position * HALF + d).to(tl.float32)
        if group < q_groups:
            out = q_out_ptr + wide * n_heads * 2 * HALF
            rotate_heads(
                q_ptr + wide * q_stride, out, 2 * HALF, cos, sin, group * BLOCK_HEADS, n_heads, BLOCK_HEADS, HALF
            )
        else:
            slot = tl.cast(tl.load(slot_ptr + token), tl.int64)
            if slot >= 0:
                first = (group - q_groups) * BLOCK_HEADS
                cache = tl.cast(token // tokens_per_row, tl.int64) * cache_batch_stride + slot * cache_slot_stride
                out = k_cache_ptr + cache
                rotate_heads(
                    k_ptr + wide * k_stride, out, cache_head_stride, cos, sin, first, n_kv_heads, BLOCK_HEADS, HALF
                )
                values = v_ptr + wide * v_stride
                copy_heads(values, v_cache_ptr + cache, cache_head_stride, first, n_kv_heads, BLOCK_HEADS, 2 * HALF)
