"""Fuse causal grouped-query attention with its KV cache and rotary embeddings into qcompile::Attention.

    present_key   = concat(past_key, RotaryEmbedding(k))          present_value = concat(past_value, v)
    y = softmax(RotaryEmbedding(q) @ repeat(present_key)^T * scale + mask) @ repeat(present_value)

q: [B, S, H, d] before the transpose; k, v: [B, S, K, d]; past_*: [B, K, P, d]; mask: [B or 1, 1, S, T].
The mask is not matched by structure: in every case its values must be exactly "causal, and not padding", including one
decode step after 131,072 tokens, where a sliding window would show. Then attention_mask itself takes its place.
Source: Vaswani et al. 2017, eq. 1; Ainslie et al. 2023; repeat_kv of transformers' Qwen2.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.cases import Analysis, Case
from qcompile.functions import ATTENTION, DOMAIN
from qcompile.passes.base import PassContext
from qcompile.passes.canonicalize_shapes import shape_constant
from qcompile.passes.rule import FusionRule, OrValue, Reject, RulePass, scalar

LONG_DECODE = Case("decode after 131072 tokens", 1, 1, 131072)
_BLOCKED = -1e4


def repeat_kv(op: Any, x: Any, expanded: Any, joined: Any) -> Any:
    """x itself, or each kv head repeated for the heads of its group."""
    return OrValue([op.Reshape(op.Expand(op.Unsqueeze(x, [2]), expanded), joined), x])


class Attention(FusionRule):
    """The primitive chain, from the transposed rows of q, k and v to the joined heads."""

    emits = ATTENTION
    rows_that_matter = True

    def __init__(self, context: PassContext) -> None:
        super().__init__(context)
        self._long: Analysis | None = None

    def pattern(self, op, q, k, v, past_key, past_value, cos, sin, mask, scale, k_wide, k_joined, v_wide, v_joined, flat, zero):
        q_rope = op.RotaryEmbedding(op.Transpose(q, perm=[0, 2, 1, 3]), cos, sin, _domain=DOMAIN)
        k_rope = op.RotaryEmbedding(op.Transpose(k, perm=[0, 2, 1, 3]), cos, sin, _domain=DOMAIN)
        present_key = op.Concat(past_key, k_rope)
        present_value = op.Concat(past_value, op.Transpose(v, perm=[0, 2, 1, 3]))
        scores = op.Mul(op.MatMul(q_rope, op.Transpose(repeat_kv(op, present_key, k_wide, k_joined), perm=[0, 1, 3, 2])), scale)
        masked = op.Add(scores, mask)
        weights = op.Softmax(OrValue([op.Cast(masked), masked]))
        weights = OrValue([op.Cast(weights), weights])
        weights = OrValue([op.Where(op.IsNaN(weights), zero, weights), weights])
        mixed = op.MatMul(weights, repeat_kv(op, present_value, v_wide, v_joined))
        y = op.Reshape(op.Transpose(mixed, perm=[0, 2, 1, 3]), flat)
        return y, present_key, present_value

    def require(self, q, k, v, past_key, past_value, mask, scale, zero, **_):
        scalar(scale, "scale")
        if zero is not None and scalar(zero, "replacement of NaN") != 0.0:
            raise Reject("NaN is not replaced by 0")
        bound: dict[str, list[int]] = {}
        self.dims(bound, q, "B S H d")
        self.dims(bound, k, "B S K d")
        self.dims(bound, v, "B S K d")
        self.dims(bound, past_key, "B K P d")
        self.dims(bound, past_value, "B K P d")
        if _attention_mask(self.model) is None:
            raise Reject("the graph has no input attention_mask [B, T]")
        self._require_causal(self.analysis, mask)
        if self._long is None:
            self._long = Analysis(self.model, [LONG_DECODE])
        self._require_causal(self._long, mask)

    def rewrite(self, op, q, k, v, past_key, past_value, cos, sin, scale, **_):
        shapes = [self.specs(value)[0].shape for value in (q, k)]
        flat = shape_constant(self.model.graph, [0, 0, -1])
        rows = [op.Reshape(value, flat) for value in (q, k, v)]
        return self.emit(
            op, *rows, past_key, past_value, cos, sin, _attention_mask(self.model),
            num_heads=shapes[0][2], kv_num_heads=shapes[1][2], scale=scalar(scale),
        )  # fmt: skip

    def _require_causal(self, analysis: Analysis, mask: ir.Value) -> None:
        for case, array in zip(analysis.cases, analysis.values(mask) or _unknown(mask), strict=True):
            wanted = np.broadcast_to(case.causal_mask()[:, None], _mask_shape(case))
            if array.ndim != 4 or array.shape[1:] != wanted.shape[1:]:
                raise Reject(f"mask '{mask.name}' is {list(array.shape)} in {case.name}, wanted {list(wanted.shape)}")
            seen = np.broadcast_to(array, wanted.shape)
            rows = np.broadcast_to(case.attention_mask()[:, None, case.past_length :, None] == 1, wanted.shape)
            open_, closed = wanted & rows, ~wanted & rows
            if not (seen[open_] == 0).all() or not (seen[closed] <= _BLOCKED).all():
                raise Reject(f"mask '{mask.name}' is not causal and padding only ({case.name})")


def _mask_shape(case: Case) -> tuple[int, int, int, int]:
    return case.batch_size, 1, case.sequence_length, case.total_length


def _unknown(mask: ir.Value) -> list[np.ndarray]:
    raise Reject(f"mask '{mask.name}' does not hang on attention_mask and shapes alone")


def _attention_mask(model: ir.Model) -> ir.Value | None:
    for value in model.graph.inputs:
        if value.name == "attention_mask" and value.dtype == ir.DataType.INT64:
            return value
    return None


class FuseAttention(RulePass):
    """Attention with KV cache."""

    name = "fuse-attention"
    summary = "rotary, KV cache, softmax(q k^T * scale + mask) v -> Attention"
    rules = (Attention,)


__all__ = ["LONG_DECODE", "Attention", "FuseAttention"]
