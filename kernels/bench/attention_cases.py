"""Rotary embedding with cache, decode attention, and the choice of the token."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

from qcompile.kernels.bench.cases import OPS, Case, Setting
from qcompile.kernels.decode_attention.reference import reference as decode_attention
from qcompile.kernels.rope_cache.reference import reference as rope_cache
from qcompile.kernels.sampler.reference import reference as sampler


def attention_cases(s: Setting) -> Iterator[Case]:
    """Those of one phase; attention and the sampler in decode only."""
    yield _rope(s)
    if s.phase.length == 1:
        yield _attention(s)
        yield _sampler(s, 1)
        yield _sampler(s, 20)


def _rope(s: Setting) -> Case:
    heads, kv_heads, d = s.dims.num_attention_heads, s.dims.num_key_value_heads, s.dims.head_dim
    batch, length, capacity = s.phase.batch, s.phase.length, s.phase.context + 1

    def make() -> tuple[Any, ...]:
        qkv = s.randn(batch, length, heads + 2 * kv_heads, d)
        q, k, v = qkv.split([heads, kv_heads, kv_heads], 2)
        angles = torch.rand(capacity, d // 2, device=s.device) * 6
        slots = torch.arange(capacity - length, capacity, device=s.device).to(torch.int32).repeat(batch)
        caches = (torch.zeros(batch, kv_heads, capacity, d, device=s.device, dtype=s.dtype) for _ in range(2))
        return q, k, v, angles.cos(), angles.sin(), slots, slots.clone(), *caches

    return Case(
        "rope_cache",
        s.label,
        make,
        OPS.rope_cache,
        _eager_rope,
        lambda *a: rope_cache(*a[:7], a[7].clone(), a[8].clone(), torch.float64),
        s.phase.tokens * ((2 * heads + 4 * kv_heads) * d * s.size + 8) + length * d * 4,
    )


def _eager_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> torch.Tensor:
    """As transformers does it: rotate_half with tables of the model's dtype, then index_copy into a StaticCache."""
    batch, length = q.shape[:2]
    c = torch.cat([cos, cos], -1)[positions].to(q.dtype).view(batch, length, 1, -1)
    s = torch.cat([sin, sin], -1)[positions].to(q.dtype).view(batch, length, 1, -1)
    where = slots[:length].long()
    k_cache.index_copy_(2, where, (k * c + _half(k) * s).transpose(1, 2))
    v_cache.index_copy_(2, where, v.transpose(1, 2))
    return q * c + _half(q) * s


def _half(x: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, -1)
    return torch.cat([-high, low], -1)


def _attention(s: Setting) -> Case:
    heads, kv_heads, d = s.dims.num_attention_heads, s.dims.num_key_value_heads, s.dims.head_dim
    batch, context = s.phase.batch, s.phase.context

    def make() -> tuple[Any, ...]:
        starts = torch.zeros(batch, dtype=torch.int32, device=s.device)
        caches = (s.randn(batch, kv_heads, context, d) for _ in range(2))
        return s.randn(batch, heads, d), *caches, starts, starts + context, d**-0.5

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: Any, __: Any, scale: float) -> torch.Tensor:
        return functional.scaled_dot_product_attention(q[:, :, None], k, v, scale=scale, enable_gqa=True)[:, :, 0]

    return Case(
        "decode_attention",
        s.label,
        make,
        OPS.decode_attention,
        _eager_attention,
        lambda *a: decode_attention(*a, torch.float64),
        s.size * (2 * batch * kv_heads * context * d + 2 * batch * heads * d),
        vendor=("SDPA", sdpa),
    )


def _eager_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: Any, __: Any, scale: float) -> torch.Tensor:
    """As transformers' eager attention: keys repeated for their query heads."""
    group = q.shape[1] // k.shape[1]
    keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q[:, :, None] @ keys.transpose(-1, -2) * scale
    return (torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ values)[:, :, 0]


def _sampler(s: Setting, top_k: int) -> Case:
    batch, vocab = s.phase.batch, s.dims.vocab_size

    def eager(logits: torch.Tensor, k: int, _: float, __: None) -> Any:
        values, ids = torch.topk(logits, k)
        return values.float(), ids.to(torch.int32), ids[:, 0].to(torch.int32)

    def greedy(logits: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.argmax(logits, -1)

    return Case(
        "sampler",
        f"{s.label}, top {top_k}",
        # all logits different, so that topk has no ties to break its own way
        lambda: (torch.randn(batch, vocab, device=s.device), top_k, 1.0, None),
        OPS.sampler,
        eager,
        sampler,
        4 * batch * vocab,
        vendor=("argmax", greedy) if top_k == 1 else None,
        extra={"vendor_computes_less": True},
    )
