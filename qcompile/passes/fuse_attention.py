"""Fuse causal grouped-query attention with its KV cache and rotary embeddings into qcompile::Attention.

    present_key   = concat(past_key, RotaryEmbedding(k))          present_value = concat(past_value, v)
    y = softmax(RotaryEmbedding(q) @ repeat(present_key)^T * scale + mask) @ repeat(present_value)

q: [B, S, H, d] before the transpose; k, v: [B, S, K, d]; past_*: [B, K, P, d]; mask: broadcast to [B, 1, S, T]. The
scale may stand at q, at k, at both or at the product; the mask may be added or selected by Where; or all of it is the
Attention operator of opset 23.
The mask is not matched by structure: in every case its values must be exactly "causal, and not padding", including one
decode step after 131,072 tokens, where a sliding window would show. Then attention_mask itself takes its place.
Source: Vaswani et al. 2017, eq. 1; Ainslie et al. 2023; repeat_kv of transformers' Qwen2.
"""

from __future__ import annotations

import abc
import math
from typing import Any

import onnx_ir as ir

from qcompile.functions import ATTENTION, DOMAIN
from qcompile.passes.canonicalize_shapes import shape_constant
from qcompile.passes.causal_mask import require_causal
from qcompile.passes.rule import FusionRule, OrValue, Reject, RulePass, scalar

_HEADS_FIRST = [0, 2, 1, 3]


def cached(op: Any, k: Any, v: Any, past_key: Any, past_value: Any, cos: Any, sin: Any) -> tuple[Any, Any]:
    """The caches after this step: the past, then the rotated keys, or the values."""
    k_rope = op.RotaryEmbedding(op.Transpose(k, perm=_HEADS_FIRST), cos, sin, _domain=DOMAIN)
    present_key = op.Concat(past_key, k_rope)
    present_value = op.Concat(past_value, op.Transpose(v, perm=_HEADS_FIRST))
    return present_key, present_value


def repeat_kv(op: Any, x: Any, expanded: Any, joined: Any) -> Any:
    """x itself, or each kv head repeated for the heads of its group."""
    groups = op.Unsqueeze(x, [2])
    wide = OrValue([op.Expand(groups, expanded), op.Tile(groups, expanded)])
    return OrValue([op.Reshape(wide, joined), x])


class CausalAttention(FusionRule):
    """Heads in their layout, a causal mask and a scale, whatever nodes compute with them."""

    emits = ATTENTION
    rows_that_matter = True

    def require(self, mask: ir.Value, **bindings: Any) -> None:
        bound: dict[str, list[int]] = {}
        layout = {"q": "B S H d", "k": "B S K d", "v": "B S K d", "past_key": "B K P d", "past_value": "B K P d"}
        for name, letters in layout.items():
            self.dims(bound, bindings[name], letters)
        if bound["H"][0] % bound["K"][0]:
            raise Reject(f"{bound['H'][0]} heads do not share {bound['K'][0]} kv heads evenly")
        for name in ("k_wide", "v_wide"):
            self.require_repeats(bindings.get(name), bound["H"][0] // bound["K"][0])
        if _attention_mask(self.model) is None:
            raise Reject("the graph has no input attention_mask [B, T] of integers")
        require_causal(self, mask)

    def rewrite(self, op: Any, **bindings: Any) -> Any:
        flat = shape_constant(self.model.graph, [0, 0, -1])
        rows = [op.Reshape(bindings[name], flat) for name in ("q", "k", "v")]
        mask = _attention_mask(self.model)
        if mask is not None and mask.dtype != ir.DataType.INT64:
            mask = op.Cast(mask, to=ir.DataType.INT64)
        others = [bindings[name] for name in ("past_key", "past_value", "cos", "sin")]
        heads = [self.specs(bindings[name])[0].shape[2] for name in ("q", "k")]
        scale = self.scale(**bindings)
        return self.emit(op, *rows, *others, mask, num_heads=heads[0], kv_num_heads=heads[1], scale=scale)

    def require_repeats(self, wide: ir.Value | None, group: int) -> None:
        """Reject a shape (of an Expand) or repeats (of a Tile) that do not put the heads of a group side by side."""
        values = self.analysis.values(wide) if wide is not None else None
        for seen in values or ():
            if seen.size != 5 or int(seen[2]) != group:
                raise Reject(f"kv heads are widened by {seen.tolist()}, wanted {group} at axis 2")

    @abc.abstractmethod
    def scale(self, *operands: Any, **bindings: Any) -> float:
        """Return the factor of the scores q k^T."""


class Attention(CausalAttention):
    """The primitive chain, from the transposed rows of q, k and v to the joined heads."""

    landmark = "Softmax"

    def pattern(
        self,
        op: Any,
        q: Any,
        k: Any,
        v: Any,
        past_key: Any,
        past_value: Any,
        cos: Any,
        sin: Any,
        mask: Any,
        blocked: Any,
        q_scale: Any,
        k_scale: Any,
        scale: Any,
        k_wide: Any,
        k_joined: Any,
        v_wide: Any,
        v_joined: Any,
        flat: Any,
        zero: Any,
    ) -> Any:
        present_key, present_value = cached(op, k, v, past_key, past_value, cos, sin)
        q_rope = op.RotaryEmbedding(op.Transpose(q, perm=_HEADS_FIRST), cos, sin, _domain=DOMAIN)
        queries = OrValue([op.Mul(q_rope, q_scale), q_rope])
        keys = op.Transpose(repeat_kv(op, present_key, k_wide, k_joined), perm=[0, 1, 3, 2])
        product = op.MatMul(queries, OrValue([op.Mul(keys, k_scale), keys]))
        scores = OrValue([op.Mul(product, scale), product])
        scores = OrValue([op.Cast(scores), scores])
        masked = OrValue([op.Add(scores, mask), op.Where(mask, scores, blocked)])
        weights = op.Softmax(OrValue([op.Cast(masked), masked]), axis=-1)
        weights = OrValue([op.Cast(weights), weights])
        weights = OrValue([op.Where(op.IsNaN(weights), zero, weights), weights])
        mixed = op.MatMul(weights, repeat_kv(op, present_value, v_wide, v_joined))
        y = op.Reshape(op.Transpose(mixed, perm=_HEADS_FIRST), flat)
        return y, present_key, present_value

    def require(self, mask: ir.Value, **bindings: Any) -> None:
        zero, blocked = bindings.get("zero"), bindings.get("blocked")
        if zero is not None and scalar(zero, "replacement of NaN") != 0.0:
            raise Reject("NaN is not replaced by 0")
        if blocked is not None and scalar(blocked, "score of hidden keys") > -1e4:
            raise Reject(f"hidden keys get the score {scalar(blocked)}, which is not low enough to hide them")
        self.scale(**bindings)
        super().require(mask, **bindings)

    def scale(self, **bindings: Any) -> float:
        """Return the product of the factors at q, at k and at their product; those that are absent are 1."""
        values = [bindings.get(name) for name in ("q_scale", "k_scale", "scale")]
        return math.prod((scalar(value, "attention scale") for value in values if value is not None), start=1.0)


class AttentionOperatorRule(CausalAttention):
    """The Attention operator of opset 23."""

    landmark = "Attention"

    def require(self, mask: ir.Value, **bindings: Any) -> None:
        _require_plain(bindings["mixed"])
        super().require(mask, **bindings)

    def scale(self, q: ir.Value, mixed: ir.Value, **_: Any) -> float:
        """Return the operator's own scale, by default 1 / sqrt(d)."""
        node = mixed.producer()
        scale = node.attributes.get("scale") if node is not None else None
        return scale.as_float() if scale is not None else float(self.specs(q)[0].shape[3]) ** -0.5


class AttentionOperator(AttentionOperatorRule):
    """On rotated, cached and repeated heads."""

    def pattern(
        self,
        op: Any,
        q: Any,
        k: Any,
        v: Any,
        past_key: Any,
        past_value: Any,
        cos: Any,
        sin: Any,
        mask: Any,
        k_wide: Any,
        k_joined: Any,
        v_wide: Any,
        v_joined: Any,
        flat: Any,
    ) -> Any:
        present_key, present_value = cached(op, k, v, past_key, past_value, cos, sin)
        q_rope = op.RotaryEmbedding(op.Transpose(q, perm=_HEADS_FIRST), cos, sin, _domain=DOMAIN)
        keys = repeat_kv(op, present_key, k_wide, k_joined)
        values = repeat_kv(op, present_value, v_wide, v_joined)
        mixed = op.Attention(q_rope, keys, values, mask, _outputs=["mixed"])
        return op.Reshape(op.Transpose(mixed, perm=_HEADS_FIRST), flat), present_key, present_value


class AttentionOperatorWithCache(AttentionOperatorRule):
    """Appending to the cache itself."""

    def pattern(
        self, op: Any, q: Any, k: Any, v: Any, past_key: Any, past_value: Any, cos: Any, sin: Any, mask: Any, flat: Any
    ) -> Any:
        q_rope = op.RotaryEmbedding(op.Transpose(q, perm=_HEADS_FIRST), cos, sin, _domain=DOMAIN)
        k_rope = op.RotaryEmbedding(op.Transpose(k, perm=_HEADS_FIRST), cos, sin, _domain=DOMAIN)
        values = op.Transpose(v, perm=_HEADS_FIRST)
        mixed, present_key, present_value = op.Attention(
            q_rope, k_rope, values, mask, past_key, past_value, _outputs=["mixed", "present_key", "present_value"]
        )
        return op.Reshape(op.Transpose(mixed, perm=_HEADS_FIRST), flat), present_key, present_value


def _require_plain(mixed: ir.Value) -> None:
    """Reject an Attention operator that does more than softmax(q k^T * scale + mask) v."""
    node = mixed.producer()
    assert node is not None
    for name in ("is_causal", "softcap", "qk_matmul_output_mode"):
        attribute = node.attributes.get(name)
        if attribute is not None and attribute.value:
            raise Reject(f"its {name} is {attribute.value}")
    if len(node.outputs) > 3 and node.outputs[3].uses():
        raise Reject("its scores are read too")


def _attention_mask(model: ir.Model) -> ir.Value | None:
    for value in model.graph.inputs:
        if value.name == "attention_mask" and value.dtype is not None and value.dtype.is_integer():
            return value if value.shape is not None and len(value.shape) == 2 else None
    return None


class FuseAttention(RulePass):
    """Attention with KV cache."""

    name = "fuse-attention"
    summary = "rotary, KV cache, softmax(q k^T * scale + mask) v -> Attention"
    rules = (Attention, AttentionOperator, AttentionOperatorWithCache)
