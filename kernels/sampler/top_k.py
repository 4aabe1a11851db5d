"""The top_k choice on a GPU: logits are read once, for the best of each segment; no NPU runs it.

A segment is a few neighbouring lanes of every block of a part. In the order of falling logits, ids rising among equal ones, the
first top_k logits of a row lie in the top_k segments whose best come first: in front of a logit of any other segment stand the
best of those top_k. So the second kernel looks at the best of the segments, and at all of the few it chose.
"""

import triton
import triton.language as tl

from qcompile.kernels.sampler.greedy import largest_by_lane
from qcompile.kernels.sampler.kernel import NONE, draw, take_largest


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
def first_of(values, ids, top_k, BLOCK_K: tl.constexpr):
    """The top_k largest values in falling order, and their ids, in BLOCK_K lanes; no value is NaN."""
    ranks = tl.arange(0, BLOCK_K)
    keys = in_order((values + 0.0).to(tl.int32, bitcast=True))  # -0 equals 0
    LEAST: tl.constexpr = -NONE - 1
    top_keys = tl.full((BLOCK_K,), LEAST, dtype=tl.int32)
    top_ids = tl.full((BLOCK_K,), NONE, dtype=tl.int32)
    for k in range(top_k):
        best, chosen = take_largest(keys, ids)
        top_keys, top_ids = tl.where(ranks == k, best, top_keys), tl.where(ranks == k, chosen, top_ids)
        keys, ids = tl.where(ids == chosen, LEAST, keys), tl.where(ids == chosen, NONE, ids)
    return in_order(top_keys).to(tl.float32, bitcast=True), top_ids


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
    row, lanes = tl.cast(tl.program_id(0), tl.int64), tl.arange(0, BLOCK_SEGMENTS)
    place, live = row * n_parts * SEGMENTS + lanes, lanes < n_parts * SEGMENTS
    values = tl.load(value_ptr + place, mask=live, other=-float("inf"))
    ids = tl.load(id_ptr + place, mask=live, other=NONE)
    _, firsts = first_of(values, ids, top_k, BLOCK_K)
    n_blocks = tl.cdiv(n_vocab, BLOCK_VOCAB)
    members = tl.cdiv(n_blocks, n_parts) * WIDTH  # of a segment, at most
    candidates = tl.arange(0, BLOCK_CANDIDATES)
    rank, member = candidates // members, candidates % members
    first = tl.gather(firsts, tl.minimum(rank, BLOCK_K - 1), 0)
    block, lane = first // BLOCK_VOCAB, first % BLOCK_VOCAB // WIDTH * WIDTH + member % WIDTH
    part = ((block + 1) * n_parts - 1) // n_blocks  # the last that begins at or before this block
    own = part * n_blocks // n_parts + member // WIDTH
    ids = own * BLOCK_VOCAB + lane
    live = (rank < top_k) & (own < (part + 1) * n_blocks // n_parts) & (ids < n_vocab)
    values = tl.load(logits_ptr + row * row_stride + ids, mask=live, other=-float("inf")).to(tl.float32)
    values = tl.where(values == values, values, -float("inf"))
    top_values, top_ids = first_of(values, tl.where(live, ids, NONE), top_k, BLOCK_K)
    ranks = tl.arange(0, BLOCK_K)
    tl.store(top_value_ptr + row * top_k + ranks, top_values, mask=ranks < top_k)
    tl.store(top_id_ptr + row * top_k + ranks, top_ids, mask=ranks < top_k)
    uniform = tl.load(uniform_ptr + row) if HAS_UNIFORM else 0.0
    tl.store(token_ptr + row, draw(top_values, top_ids, uniform, top_k, inverse_temperature, BLOCK_K))
