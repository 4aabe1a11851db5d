"""The top_k choice on a GPU: logits are read once, for the best of each segment; no NPU runs it.

A segment is a few neighbouring lanes of every block of a part. In the order of falling logits, ids rising among equal ones, the
first top_k logits of a row lie in the top_k segments whose best come first: in front of a logit of any other segment stand the
best of those top_k. So the second kernel looks at the best of the segments, and at all of the few it chose.

Neither choice takes top_k turns over all of them. The best of GROUPS groups of segments are put in order first, in turns over
few; any other segment among the first top_k comes in front of their last, and takes a turn of its own. So it is with the logits
of the chosen segments, whose best are in order already.
"""

import triton
import triton.language as tl

from qcompile.kernels.sampler.greedy import largest_by_lane
from qcompile.kernels.sampler.kernel import NONE, draw, take_largest

LEAST: tl.constexpr = tl.constexpr(-2147483648)  # below keys_of any number
# 32 lanes by 16 bytes: each warp holds the best of all groups, and a turn needs no barrier.
GROUPS: tl.constexpr = tl.constexpr(128)


# fmt: off
@triton.jit
def sampler_segment_kernel(
    logits_ptr, value_ptr, id_ptr, n_vocab, n_parts, row_stride,
    BLOCK_VOCAB: tl.constexpr, SEGMENTS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):
    # fmt: on
    """The largest logit of every segment of the blocks that are part program_id(0)'s of row program_id(1), and its id.

    NaN exceeds nothing. PDL lets the kernel that takes the largest of them start early.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    part, row = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64)
    largest, chosen = largest_by_lane(logits_ptr + row * row_stride, part, n_vocab, n_parts, BLOCK_VOCAB, STAGES)
    WIDTH: tl.constexpr = BLOCK_VOCAB // SEGMENTS
    by_segment, its_ids = tl.reshape(largest, (SEGMENTS, WIDTH)), tl.reshape(chosen, (SEGMENTS, WIDTH))
    best = tl.max(by_segment, axis=1)
    place = (row * n_parts + part) * SEGMENTS + tl.arange(0, SEGMENTS)
    tl.store(value_ptr + place, best)
    tl.store(id_ptr + place, tl.min(tl.where(by_segment == best[:, None], its_ids, NONE), axis=1))


@triton.jit
def in_order(bits):
    """Bits of fp32 as int32 that compare as the numbers do, and back: a warp reduces integers in one instruction."""
    return tl.where(bits < 0, bits ^ NONE, bits)


@triton.jit
def keys_of(values):
    """Integers that compare as values do, of which none is NaN; -0 equals 0."""
    return in_order((values + 0.0).to(tl.int32, bitcast=True))


@triton.jit
def first_of(keys, ids, top_k, BLOCK_K: tl.constexpr):
    """The top_k largest keys in falling order, and their ids, in BLOCK_K lanes."""
    ranks = tl.arange(0, BLOCK_K)
    top_keys = tl.full((BLOCK_K,), LEAST, dtype=tl.int32)
    top_ids = tl.full((BLOCK_K,), NONE, dtype=tl.int32)
    for k in range(top_k):
        best, chosen = take_largest(keys, ids)
        top_keys, top_ids = tl.where(ranks == k, best, top_keys), tl.where(ranks == k, chosen, top_ids)
        keys = tl.where(ids == chosen, LEAST, keys)
    return top_keys, top_ids


@triton.jit
def is_in_front(key, token, other_key, other_token):
    """Whether a token comes before another: its key is larger, or equal and its id smaller."""
    return (key > other_key) | ((key == other_key) & (token < other_token))


@triton.jit
def with_others(top_keys, top_ids, keys, ids, top_k, BLOCK_K: tl.constexpr):
    """The top_k of those in top_keys, which are in order, and of keys: a turn for each of these that is among them."""
    ranks = tl.arange(0, BLOCK_K)
    before = tl.maximum(ranks - 1, 0)
    last = tl.max(tl.where(ranks == top_k - 1, top_keys, LEAST), axis=0)
    best = tl.max(keys)
    while best >= last:
        chosen = tl.min(tl.where(keys == best, ids, NONE))
        place = tl.sum(is_in_front(top_keys, top_ids, best, chosen).to(tl.int32), axis=0)
        moved_keys, moved_ids = tl.gather(top_keys, before, 0), tl.gather(top_ids, before, 0)
        top_keys = tl.where(ranks < place, top_keys, tl.where(ranks == place, best, moved_keys))
        top_ids = tl.where(ranks < place, top_ids, tl.where(ranks == place, chosen, moved_ids))
        keys = tl.where(ids == chosen, LEAST, keys)
        best = tl.where(place < top_k, tl.max(keys), LEAST)  # nothing comes in front of one that has no place
    return top_keys, top_ids


@triton.jit
def top_segments(keys, ids, top_k, BLOCK_K: tl.constexpr):
    """The top_k of keys [rows, GROUPS] in order, and their ids: of the largest of every column, then of the others."""
    best, chosen = take_largest(keys, ids)
    top_keys, top_ids = first_of(best, chosen, top_k, BLOCK_K)
    others = tl.where(ids == chosen[None, :], LEAST, keys)
    return with_others(top_keys, top_ids, others, ids, top_k, BLOCK_K)


# fmt: off
@triton.jit
def sampler_candidates_kernel(
    logits_ptr, value_ptr, id_ptr, uniform_ptr, top_value_ptr, top_id_ptr, token_ptr,
    n_vocab, n_parts, row_stride, top_k, inverse_temperature,
    BLOCK_VOCAB: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK_SEGMENTS: tl.constexpr, BLOCK_CANDIDATES: tl.constexpr,
    BLOCK_K: tl.constexpr, HAS_UNIFORM: tl.constexpr, PDL: tl.constexpr,
):
    # fmt: on
    """The top_k of a row out of the segments whose best come first, and one of them drawn, as sampler_merge_kernel does."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    WIDTH: tl.constexpr = BLOCK_VOCAB // SEGMENTS
    row = tl.cast(tl.program_id(0), tl.int64)
    lanes = tl.arange(0, BLOCK_SEGMENTS // GROUPS)[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    place, live = row * n_parts * SEGMENTS + lanes, lanes < n_parts * SEGMENTS
    values = tl.load(value_ptr + place, mask=live, other=-float("inf"))
    ids = tl.load(id_ptr + place, mask=live, other=NONE)
    top_keys, firsts = top_segments(keys_of(values), ids, top_k, BLOCK_K)
    n_blocks = tl.cdiv(n_vocab, BLOCK_VOCAB)
    members = tl.cdiv(n_blocks, n_parts) * WIDTH  # of a segment, at most
    part = ((firsts // BLOCK_VOCAB + 1) * n_parts - 1) // n_blocks  # the last that begins at or before this block
    begins = part * n_blocks // n_parts * BLOCK_VOCAB + firsts % BLOCK_VOCAB // WIDTH * WIDTH
    ends = tl.minimum((part + 1) * n_blocks // n_parts * BLOCK_VOCAB, n_vocab)
    candidates = tl.arange(0, BLOCK_CANDIDATES)
    member, rank = candidates % members, tl.minimum(candidates // members, BLOCK_K - 1)
    ids = tl.gather(begins, rank, 0) + member // WIDTH * BLOCK_VOCAB + member % WIDTH
    live = (candidates < top_k * members) & (ids < tl.gather(ends, rank, 0))
    values = tl.load(logits_ptr + row * row_stride + ids, mask=live, other=-float("inf")).to(tl.float32)
    values = tl.where(values == values, values, -float("inf"))
    keys = tl.where(live & (ids != tl.gather(firsts, rank, 0)), keys_of(values), LEAST)
    top_keys, top_ids = with_others(top_keys, firsts, keys, ids, top_k, BLOCK_K)
    top_values = in_order(top_keys).to(tl.float32, bitcast=True)
    ranks = tl.arange(0, BLOCK_K)
    tl.store(top_value_ptr + row * top_k + ranks, top_values, mask=ranks < top_k)
    tl.store(top_id_ptr + row * top_k + ranks, top_ids, mask=ranks < top_k)
    uniform = tl.load(uniform_ptr + row) if HAS_UNIFORM else 0.0
    tl.store(token_ptr + row, draw(top_values, top_ids, uniform, top_k, inverse_temperature, BLOCK_K))
