"""Grouped-query attention of one query token a sequence, split over the KV length: one source for NPU and GPU."""

import triton
import triton.language as tl


@triton.jit
def attend(
    q, k_ptr, v_ptr, begin, end, slot_stride, scale, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr, D: tl.constexpr
):
    """Softmax-weighted sum of v over slots begin ... end - 1, with its largest score and its sum of weights.

    Online softmax, Milakov & Gimelshein 2018, algorithm 3.
    """
    d = tl.arange(0, D)[None, :]
    largest = tl.full((BLOCK_G,), -float("inf"), dtype=tl.float32)
    weight_sum = tl.zeros((BLOCK_G,), dtype=tl.float32)
    total = tl.zeros((BLOCK_G, D), dtype=tl.float32)
    for start in range(begin, end, BLOCK_T):
        slots = tl.arange(0, BLOCK_T)
        live = slots < end - start
        base = tl.cast(start, tl.int64) * slot_stride
        offsets = slots[:, None] * slot_stride + d
        k = tl.load(k_ptr + base + offsets, mask=live[:, None] & (d < D), other=0.0)
        v = tl.load(v_ptr + base + offsets, mask=live[:, None] & (d < D), other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(live[None, :], scores, -float("inf"))
        now = tl.maximum(largest, tl.max(scores, axis=1), propagate_nan=tl.PropagateNan.ALL)
        weights = tl.exp(scores - now[:, None])
        shrink = tl.exp(largest - now)
        weight_sum = weight_sum * shrink + tl.sum(weights, axis=1)
        total = total * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        largest = now
    return total, largest, weight_sum


@triton.jit
def slots_of(split, n_splits, first, last, BLOCK_T: tl.constexpr):
    """First slot of a split and one past its last: whole blocks, the same number in every split but the last ones."""
    span = tl.cdiv(tl.cdiv(last - first, n_splits), BLOCK_T) * BLOCK_T
    begin = first + split * span
    return begin, tl.minimum(begin + span, last)


# fmt: off
@triton.jit
def decode_attention_kernel(
    q_ptr, k_cache_ptr, v_cache_ptr, start_ptr, length_ptr, partial_ptr, log_sum_ptr, n_batch, n_kv_heads, group, n_splits,
    q_stride, cache_batch_stride, cache_head_stride, cache_slot_stride, scale,
    BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr, D: tl.constexpr, IS_SPLIT: tl.constexpr,
):
    # fmt: on
    """One split of slots start[b] ... length[b] - 1 for the group of query heads that share a key head.

    partial [B, H, splits, D] is the split's own attention, log_sum [B, H, splits] the log of its sum of weights (-inf when it
    has no slots). Without IS_SPLIT there is one, whose own attention is the result, in its dtype; log_sum is left alone.
    """
    heads = tl.arange(0, BLOCK_G)
    d = tl.arange(0, D)[None, :]
    for tile in range(tl.program_id(0), n_batch * n_kv_heads * n_splits, tl.num_programs(0)):
        split = tile % n_splits
        kv_head = (tile // n_splits) % n_kv_heads
        batch = tl.cast(tile // (n_splits * n_kv_heads), tl.int64)
        begin, end = slots_of(split, n_splits, tl.load(start_ptr + batch), tl.load(length_ptr + batch), BLOCK_T)
        in_group = heads[:, None] < group
        q_offsets = (kv_head * group + heads[:, None]) * D + d
        q = tl.load(q_ptr + batch * q_stride + q_offsets, mask=in_group & (d < D), other=0.0)
        cache = batch * cache_batch_stride + tl.cast(kv_head, tl.int64) * cache_head_stride
        total, largest, weight_sum = attend(
            q, k_cache_ptr + cache, v_cache_ptr + cache, begin, end, cache_slot_stride, scale, BLOCK_G, BLOCK_T, D
        )
        weight_sum = tl.where(largest == -float("inf"), 1.0, weight_sum)
        rows = ((batch * n_kv_heads + kv_head) * group + heads) * n_splits + split
        own = (total / weight_sum[:, None]).to(partial_ptr.dtype.element_ty)
        tl.store(partial_ptr + rows[:, None] * D + d, own, mask=in_group & (d < D))
        if IS_SPLIT:
            tl.store(log_sum_ptr + rows, largest + tl.log(weight_sum), mask=heads < group)


@triton.jit
def decode_attention_merge_kernel(
    partial_ptr, log_sum_ptr, out_ptr, n_rows, n_splits, BLOCK_S: tl.constexpr, D: tl.constexpr
):
    """The splits of one query head, weighted by their sums of weights; a head with no slots at all gives zeros."""
    splits = tl.arange(0, BLOCK_S)
    d = tl.arange(0, D)
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        base = tl.cast(row, tl.int64) * n_splits
        live = splits < n_splits
        log_sums = tl.load(log_sum_ptr + base + splits, mask=live, other=-float("inf"))
        weights = tl.where(log_sums == -float("inf"), 0.0, tl.exp(log_sums - tl.max(log_sums, axis=0)))
        offsets = (base * D) + (splits[:, None] * D + d[None, :])
        partial = tl.load(partial_ptr + offsets, mask=live[:, None] & (d[None, :] < D), other=0.0)
        weight_sum = tl.sum(weights, axis=0)
        out = tl.sum(partial * weights[:, None], axis=0) / tl.where(weight_sum == 0.0, 1.0, weight_sum)
        tl.store(out_ptr + tl.cast(row, tl.int64) * D + d, out.to(out_ptr.dtype.element_ty))
