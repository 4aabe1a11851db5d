"""Attention with a KV cache of fixed length: rotary embedding by table, grouped heads in the rows of one product.

    qk = rotary([q | k]);  s = q [K^T | k^T] + mask;  y = softmax(s) [V ; v]        (Vaswani et al. 2017, eq. 1)

B slots, S new tokens of each, T cached ones, H heads on K kv heads (G = H / K of a group), d head. The rows of a group
share its keys, so q is [B, K, G*S, d] and nothing is repeated. The softmax scale is in the weights already. The graph
reads past_key_values.* [B, K, T, d] and returns the new rows only, present.* [B, K, S, d]: whoever runs it appends them.

Scores: a key bias as large as Qwen2's puts hundreds into every score, where float16 has steps of 0.5. Softmax does not
change when one number is taken from all scores of a row, so `centred` keys have the first new key taken from them:
q (k_j - k_0) = q k_j - q k_0. What is left is small and exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.ascend.buckets import Bucket
from qcompile.ascend.lowering.static_graph import StaticGraph, dims

# Added to the scores of what a query must not see: exp underflows to 0, and no float16 sum with a score overflows.
MASKED = -30000.0


@dataclass(frozen=True)
class StepInputs:
    """What all layers share: angles [B, S, 1, d] and the mask [B, 1, S, T + S]: added to scores, or for flash attention."""

    cos: ir.Value
    sin: ir.Value
    mask: ir.Value


# Appends the mask from float32 [B, 1, 1, T], -1 for cached rows that hold nothing yet.
MaskForm = Callable[[StaticGraph, Bucket, ir.Value], ir.Value]


def step_inputs(
    graph: StaticGraph, bucket: Bucket, cos: np.ndarray, sin: np.ndarray, mask_form: MaskForm | None = None
) -> StepInputs:
    """Append what is computed once per step from `past_lengths` int32 [B].

    Args:
        graph: The graph to append to.
        bucket: Its shapes.
        cos: Cosines by position in the graph's type [T + S, d].
        sin: Sines by position in the graph's type [T + S, d].
        mask_form: Makes a mask of another form than the one that is added to scores.
    """
    b, s, d = bucket.batch, bucket.query_len, cos.shape[1]
    lengths = graph.input("past_lengths", ir.DataType.INT32, (b,))
    column = graph.reshape(lengths, (b, 1), "step.lengths")
    positions = column
    if s > 1:
        offsets = graph.constant("step.offsets", np.arange(s, dtype=np.int32)[None])
        positions = graph.op("Add", [column, offsets], (b, s), name="step.positions")
    angles = []
    for name, table in (("cos", cos), ("sin", sin)):
        rows = graph.op("Gather", [graph.constant(f"rope.{name}", table), positions], (b, s, d), name=name, axis=0)
        angles.append(graph.reshape(rows, (b, s, 1, d), f"step.{name}"))
    beyond = _beyond(graph, bucket, lengths)
    if mask_form is not None:
        return StepInputs(angles[0], angles[1], mask_form(graph, bucket, beyond))
    return StepInputs(angles[0], angles[1], _added_mask(graph, bucket, beyond, ir.DataType.from_numpy(cos.dtype)))


def _beyond(graph: StaticGraph, bucket: Bucket, lengths: ir.Value) -> ir.Value:
    """0 where cached row j < past_lengths[b], -1 beyond, in float32."""
    b, t = bucket.batch, bucket.kv_len
    float32 = ir.DataType.FLOAT
    length = graph.reshape(graph.cast(lengths, float32, "mask.lengths"), (b, 1, 1, 1), "mask.length")
    # length - 1 - j is negative exactly for the rows that hold nothing yet
    rows = graph.constant("mask.rows", np.arange(1, t + 1, dtype=np.float32).reshape(1, 1, 1, t))
    distance = graph.op("Sub", [length, rows], (b, 1, 1, t), name="mask.distance")
    low = graph.constant("mask.low", np.array(-1, dtype=np.float32))
    high = graph.constant("mask.high", np.array(0, dtype=np.float32))
    return graph.op("Clip", [distance, low, high], (b, 1, 1, t), name="mask.beyond")


def _added_mask(graph: StaticGraph, bucket: Bucket, beyond: ir.Value, dtype: ir.DataType) -> ir.Value:
    """0 where a query may look, MASKED elsewhere; among the new tokens, causal. In float32 until the end."""
    b, s, t = bucket.batch, bucket.query_len, bucket.kv_len
    factor = graph.constant("mask.factor", np.array([-MASKED], dtype=np.float32))
    past = graph.op("Mul", [beyond, factor], (b, 1, 1, t), name="mask.past32")
    past = graph.cast(past, dtype, "mask.past")
    causal = np.triu(np.full((s, s), MASKED, dtype=np.float32), 1).astype(dtype.numpy())
    new = graph.constant("mask.new", np.ascontiguousarray(np.broadcast_to(causal, (b, 1, s, s))))
    if s > 1:
        past = graph.op("Expand", [past, graph.ints(b, 1, s, t)], (b, 1, s, t), name="mask.expanded")
    return graph.op("Concat", [past, new], (b, 1, s, t + s), name="mask", axis=3)


@dataclass(frozen=True)
class Heads:
    """H query heads on K kv heads of d numbers."""

    num: int
    kv: int
    dim: int


def rotate(graph: StaticGraph, x: ir.Value, step: StepInputs, family: str, name: str) -> ir.Value:
    """Append x cos + rotate_half(x) sin for rows [B, S, N, d]        (Su et al. 2021, eq. 34, split halves)."""
    shape = dims(x)
    if family != "310B":
        return graph.op("NPURotaryMul", [x, step.cos, step.sin], shape, name=name)
    half = shape[-1] // 2
    first, second = graph.split(x, (half, half), 3, f"{name}.halves")
    negative = graph.op("Neg", [second], dims(second), name=f"{name}.negative")
    turned = graph.op("Concat", [negative, first], shape, name=f"{name}.turned", axis=3)
    straight = graph.op("Mul", [x, step.cos], shape, name=f"{name}.straight")
    crossed = graph.op("Mul", [turned, step.sin], shape, name=f"{name}.crossed")
    return graph.op("Add", [straight, crossed], shape, name=name)


def attend(
    graph: StaticGraph,
    rows: tuple[ir.Value, ir.Value, ir.Value],
    cache: tuple[ir.Value, ir.Value],
    step: StepInputs,
    heads: Heads,
    *,
    centred: bool,
    name: str,
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Append one attention.

    Args:
        graph: The graph to append to.
        rows: Rotated q [B, S, H, d] and k [B, S, K, d], and v [B, S, K, d]; q holds the softmax scale.
        cache: past key and value [B, K, T, d].
        step: Mask and angles.
        heads: How many.
        centred: Take the first new key from all keys before the scores.
        name: Prefix of the nodes' names.

    Returns:
        y [B, S, H * d], and the new key and value [B, K, S, d].
    """
    b, s, h, d = dims(rows[0])
    k, group = heads.kv, heads.num // heads.kv
    total = dims(cache[0])[2] + s
    q = graph.reshape(by_head(graph, rows[0], f"{name}.q"), (b, k, group * s, d), f"{name}.q_grouped")
    new_key, new_value = by_head(graph, rows[1], f"{name}.k"), by_head(graph, rows[2], f"{name}.v")
    keys = graph.op("Concat", [cache[0], new_key], (b, k, total, d), name=f"{name}.keys", axis=2)
    values = graph.op("Concat", [cache[1], new_value], (b, k, total, d), name=f"{name}.values", axis=2)
    if centred:
        centre = new_key
        if s > 1:
            bounds = [graph.ints(0), graph.ints(1), graph.ints(-2)]
            centre = graph.op("Slice", [new_key, *bounds], (b, k, 1, d), name=f"{name}.centre")
        keys = graph.op("Sub", [keys, centre], (b, k, total, d), name=f"{name}.centred_keys")
    columns = graph.op("Transpose", [keys], (b, k, d, total), name=f"{name}.keys_t", perm=[0, 1, 3, 2])
    scores = graph.op("MatMul", [q, columns], (b, k, group * s, total), name=f"{name}.scores")
    mask, shape = step.mask, (b, k, group * s, total)
    if s > 1:  # one slot: its kv heads take the place of the batch
        shape = (k, group, s, total)
        scores = graph.reshape(scores, shape, f"{name}.scores_by_head")
    masked = graph.op("Add", [scores, mask], shape, name=f"{name}.masked")
    weights = graph.op("Softmax", [masked], shape, name=f"{name}.weights", axis=3)
    weights = graph.reshape(weights, (b, k, group * s, total), f"{name}.weights_grouped")
    mixed = graph.op("MatMul", [weights, values], (b, k, group * s, d), name=f"{name}.mixed")
    if s > 1:
        mixed = graph.reshape(mixed, (b, h, s, d), f"{name}.mixed_by_head")
        mixed = graph.op("Transpose", [mixed], (b, s, h, d), name=f"{name}.merged", perm=[0, 2, 1, 3])
    return graph.reshape(mixed, (b, s, h * d), name), new_key, new_value


def by_head(graph: StaticGraph, rows: ir.Value, name: str) -> ir.Value:
    """Turn rows [B, S, N, d] to [B, N, S, d]; for one token that is a reshape."""
    b, s, n, d = dims(rows)
    if s == 1:
        return graph.reshape(rows, (b, n, s, d), f"{name}_by_head")
    return graph.op("Transpose", [rows], (b, n, s, d), name=f"{name}_by_head", perm=[0, 2, 1, 3])
