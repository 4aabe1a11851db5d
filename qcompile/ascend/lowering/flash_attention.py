"""Attention as NPUPromptFlashAttention, for whoever asks for it: one kernel in place of two products and a softmax.

    y = softmax(q [K^T | k^T | 0] where not masked) [V ; v ; 0]        (Dao et al. 2022; CANN's PromptFlashAttention)

The parser of CANN counts inputs: with a mask there are five, and `pse_shift` must be a real tensor, here zeros. It takes
windows of 0 tokens when none are given, so they are. The mask is 1 where a query must not look, and the keys are filled up
to a multiple of 32. The kernel keeps scores in float32, so no keys are centred here.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.ascend.buckets import Bucket
from qcompile.ascend.chips import Chip
from qcompile.ascend.lowering.attention import Heads, StepInputs, by_head
from qcompile.ascend.lowering.static_graph import StaticGraph, dims

_ALL_TOKENS = 2147483647
_MULTIPLE = 32
_MAX_HEADS, _MAX_HEAD_DIM = 256, 512


def why_no_flash(chip: Chip, heads: Heads) -> str:
    """Return why NPUPromptFlashAttention cannot be used, or an empty string."""
    if chip.family == "310P":
        return "the kernel of the 310P takes neither grouped heads nor a mask over a cache"
    if chip.family != "910B":
        return f"the {chip.family} has no such kernel"
    if heads.num > _MAX_HEADS or heads.dim > _MAX_HEAD_DIM:
        return f"{heads.num} heads of {heads.dim}; at most {_MAX_HEADS} of {_MAX_HEAD_DIM} are taken"
    return ""


def filled_up(bucket: Bucket) -> int:
    """Return the number of keys: cached, new, and up to the next multiple of 32."""
    return -(-(bucket.kv_len + bucket.query_len) // _MULTIPLE) * _MULTIPLE


def flash_mask(graph: StaticGraph, bucket: Bucket, beyond: ir.Value) -> ir.Value:
    """Append int8 [B, 1, S, keys]: 1 where a query must not look.

    Args:
        graph: The graph to append to.
        bucket: Its shapes.
        beyond: Float32 [B, 1, 1, T], -1 for rows that hold nothing yet.
    """
    b, s, t, total = bucket.batch, bucket.query_len, bucket.kv_len, filled_up(bucket)
    minus_one = graph.constant("mask.minus_one", np.array([-1], dtype=np.float32))
    past = graph.op("Mul", [beyond, minus_one], (b, 1, 1, t), name="mask.past32")
    past = graph.cast(past, ir.DataType.INT8, "mask.past")
    if s > 1:
        past = graph.op("Expand", [past, graph.ints(b, 1, s, t)], (b, 1, s, t), name="mask.expanded")
    later = np.ones((s, total - t), np.int8)
    later[:, :s] = np.triu(np.ones((s, s), np.int8), 1)
    new = graph.constant("mask.new", np.ascontiguousarray(np.broadcast_to(later, (b, 1, s, total - t))))
    return graph.op("Concat", [past, new], (b, 1, s, total), name="mask", axis=3)


def flash_attend(
    graph: StaticGraph,
    rows: tuple[ir.Value, ir.Value, ir.Value],
    cache: tuple[ir.Value, ir.Value],
    step: StepInputs,
    heads: Heads,
    *,
    name: str,
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Append one attention; arguments and results are those of `qcompile.ascend.lowering.attention.attend`."""
    b, s, h, d = dims(rows[0])
    t, total = dims(cache[0])[2], dims(step.mask)[3]
    dtype = rows[0].dtype
    assert dtype is not None
    q = by_head(graph, rows[0], f"{name}.q")
    new_key, new_value = by_head(graph, rows[1], f"{name}.k"), by_head(graph, rows[2], f"{name}.v")
    shape = (b, heads.kv, total, d)
    rest = []
    if total > t + s:
        zeros = np.zeros((b, heads.kv, total - t - s, d), dtype.numpy())
        rest.append(graph.constant(f"pfa.rest.{total - t - s}", zeros))
    keys = graph.op("Concat", [cache[0], new_key, *rest], shape, name=f"{name}.keys", axis=2)
    values = graph.op("Concat", [cache[1], new_value, *rest], shape, name=f"{name}.values", axis=2)
    pse = graph.constant(f"pfa.pse.{s}x{total}", np.zeros((1, h, s, total), dtype.numpy()))
    y = graph.op(
        "NPUPromptFlashAttention",
        [q, keys, values, pse, step.mask],
        (b, s, h, d),
        name=name,
        num_heads=h,
        input_layout="BNSD_BSND",
        scale_value=1.0,
        pre_tokens=_ALL_TOKENS,
        next_tokens=_ALL_TOKENS,
        num_key_value_heads=heads.kv,
        sparse_mode=0,
        inner_precise=0,
    )
    return graph.reshape(y, (b, s, h * d), f"{name}.rows"), new_key, new_value
