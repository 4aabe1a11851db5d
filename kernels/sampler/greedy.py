"""The greedy choice on a GPU: each program goes over a part of a row with a running maximum a lane; no NPU runs it."""

import triton
import triton.language as tl

from qcompile.kernels.sampler.kernel import NONE, take_largest


@triton.jit
def largest_by_lane(row_ptr, part, n_vocab, n_parts, BLOCK_VOCAB: tl.constexpr, STAGES: tl.constexpr):
    """The largest logit of every lane over the blocks of a part of a row, and the first id that has it; NaN exceeds nothing."""
    lanes, n_blocks = tl.arange(0, BLOCK_VOCAB), tl.cdiv(n_vocab, BLOCK_VOCAB)
    begin, end = part * n_blocks // n_parts * BLOCK_VOCAB, (part + 1) * n_blocks // n_parts * BLOCK_VOCAB
    largest, chosen = tl.full((BLOCK_VOCAB,), -float("inf"), dtype=tl.float32), begin + lanes
    for start in tl.range(begin, end, BLOCK_VOCAB, num_stages=STAGES):
        ids = start + lanes
        values = tl.load(row_ptr + ids, mask=ids < n_vocab, other=-float("inf")).to(tl.float32)
        is_larger = values > largest
        largest, chosen = tl.where(is_larger, values, largest), tl.where(is_larger, ids, chosen)
    return largest, chosen


# fmt: off
@triton.jit
def sampler_part_kernel(
    logits_ptr, value_ptr, id_ptr, n_vocab, n_parts, row_stride,
    BLOCK_VOCAB: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):
    # fmt: on
    """The largest logit of the blocks that are part program_id(0)'s of row program_id(1), and the smallest id that has it.

    Lanes are compared once, at the end: to compare them after every block costs a wait each time. NaN exceeds nothing. PDL lets
    the kernel that takes the largest part start early.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    part, row = tl.program_id(0), tl.cast(tl.program_id(1), tl.int64)
    largest, chosen = largest_by_lane(logits_ptr + row * row_stride, part, n_vocab, n_parts, BLOCK_VOCAB, STAGES)
    value, token = take_largest(largest, chosen)
    tl.store(value_ptr + row * n_parts + part, value)
    tl.store(id_ptr + row * n_parts + part, token)


@triton.jit
def sampler_largest_kernel(
    value_ptr, id_ptr, top_value_ptr, top_id_ptr, token_ptr, n_parts, BLOCK_PARTS: tl.constexpr, PDL: tl.constexpr
):
    """The largest of a row's parts. With PDL it is launched before they are there, and waits for them."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    row, parts = tl.cast(tl.program_id(0), tl.int64), tl.arange(0, BLOCK_PARTS)
    values = tl.load(value_ptr + row * n_parts + parts, mask=parts < n_parts, other=-float("inf"))
    ids = tl.load(id_ptr + row * n_parts + parts, mask=parts < n_parts, other=NONE)
    value, token = take_largest(values, ids)
    tl.store(top_value_ptr + row, value)
    tl.store(top_id_ptr + row, token)
    tl.store(token_ptr + row, token)
