"""Greedy and top-k choice over the vocabulary, in two steps: one source for NPU and GPU."""

import triton
import triton.language as tl

NONE: tl.constexpr = tl.constexpr(2147483647)  # larger than any token id


@triton.jit
def take_largest(values, ids):
    """The largest value and the smallest id that has it: plain reductions, which every target has."""
    best = tl.max(values, axis=0)
    return best, tl.min(tl.where(values == best, ids, NONE), axis=0)


@triton.jit
def draw(top_values, top_ids, uniform, top_k, inverse_temperature, BLOCK_K: tl.constexpr):
    """The first of top_k ids whose cumulated probability exceeds uniform; values fall."""
    ranks = tl.arange(0, BLOCK_K)
    weights = tl.where(ranks < top_k, tl.exp((top_values - tl.max(top_values, axis=0)) * inverse_temperature), 0.0)
    passed = uniform * tl.sum(weights, axis=0)
    drawn = tl.minimum(tl.sum((tl.cumsum(weights, axis=0) <= passed).to(tl.int32), axis=0), top_k - 1)
    return tl.sum(tl.where(ranks == drawn, top_ids, 0), axis=0)


@triton.jit
def sampler_chunk_kernel(
    logits_ptr, value_ptr, id_ptr, n_rows, n_vocab, n_chunks, row_stride, top_k, BLOCK_VOCAB: tl.constexpr
):
    """The top_k largest logits of every chunk of BLOCK_VOCAB, in falling order, with their token ids."""
    for tile in range(tl.program_id(0), n_rows * n_chunks, tl.num_programs(0)):
        row = tl.cast(tile // n_chunks, tl.int64)
        ids = (tile % n_chunks) * BLOCK_VOCAB + tl.arange(0, BLOCK_VOCAB)
        values = tl.load(logits_ptr + row * row_stride + ids, mask=ids < n_vocab, other=-float("inf")).to(tl.float32)
        values = tl.where(values == values, values, -float("inf"))
        left = ids
        for k in range(top_k):
            best, chosen = take_largest(values, left)
            out = tl.cast(tile, tl.int64) * top_k + k
            tl.store(value_ptr + out, best)
            tl.store(id_ptr + out, chosen)
            values = tl.where(ids == chosen, -float("inf"), values)
            left = tl.where(ids == chosen, NONE, left)


@triton.jit
def sampler_merge_kernel(
    value_ptr,
    id_ptr,
    uniform_ptr,
    top_value_ptr,
    top_id_ptr,
    token_ptr,
    n_rows,
    n_candidates,
    top_k,
    inverse_temperature,
    BLOCK_CANDIDATES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The top_k of a row's candidates, and one of them drawn: the first whose cumulated probability exceeds uniform."""
    lanes = tl.arange(0, BLOCK_CANDIDATES)
    ranks = tl.arange(0, BLOCK_K)
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        base = tl.cast(row, tl.int64) * n_candidates
        live = lanes < n_candidates
        values = tl.load(value_ptr + base + lanes, mask=live, other=-float("inf"))
        ids = tl.load(id_ptr + base + lanes, mask=live, other=NONE)
        top_values = tl.full((BLOCK_K,), -float("inf"), dtype=tl.float32)
        top_ids = tl.full((BLOCK_K,), NONE, dtype=tl.int32)
        for k in range(top_k):
            best, chosen = take_largest(values, ids)
            top_values = tl.where(ranks == k, best, top_values)
            top_ids = tl.where(ranks == k, chosen, top_ids)
            values = tl.where(ids == chosen, -float("inf"), values)
            ids = tl.where(ids == chosen, NONE, ids)
        out = tl.cast(row, tl.int64) * top_k + ranks
        tl.store(top_value_ptr + out, top_values, mask=ranks < top_k)
        tl.store(top_id_ptr + out, top_ids, mask=ranks < top_k)
        token = draw(top_values, top_ids, tl.load(uniform_ptr + row), top_k, inverse_temperature, BLOCK_K)
        tl.store(token_ptr + row, token)
