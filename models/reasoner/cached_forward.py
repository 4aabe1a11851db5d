"""A Qwen2 or Qwen3 with its cache in plain tensors: prompts at once, then one token a row at the row's own position."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Caches = list[tuple[Tensor, Tensor]]  # per layer keys and values [B, K, T, d]


def allocate(config: Any, rows: int, width: int, device: torch.device, dtype: torch.dtype) -> Caches:
    """Room for `width` tokens of `rows` rows."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (rows, config.num_key_value_heads, width, head_dim)
    return [
        (torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))
        for _ in range(config.num_hidden_layers)
    ]


def prefill(model: Any, ids: Tensor, caches: Caches) -> Tensor:
    """Read whole prompts, ids [B, S] from position 0 on; padding stands on the right, where causal attention ends.

    Returns:
        Hidden states [B, S, D] before the last norm; the first S positions of the caches are filled.
    """
    positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape[0], -1)

    def attend(query: Tensor, key: Tensor, value: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        for kept, new in zip(cache, (key, value), strict=True):
            kept[:, :, : new.shape[2]] = new
        mixed = functional.scaled_dot_product_attention(
            query.transpose(1, 2), key, value, is_causal=True, enable_gqa=True
        )
        return mixed.transpose(1, 2)

    return _layers(model, ids, positions, caches, attend)


def decode(model: Any, token: Tensor, position: Tensor, caches: Caches) -> Tensor:
    """Read one token a row, token and position [B, 1]; rows stand at positions of their own.

    Returns:
        Hidden states [B, 1, D] before the last norm; the caches hold the new token too.
    """
    rows = torch.arange(token.shape[0], device=token.device)
    unseen = torch.arange(caches[0][0].shape[2], device=token.device) > position  # [B, T]
    unseen = unseen[:, None, None]

    def attend(query: Tensor, key: Tensor, value: Tensor, cache: tuple[Tensor, Tensor]) -> Tensor:
        for kept, new in zip(cache, (key, value), strict=True):
            kept[rows, :, position[:, 0]] = new[:, 0]
        keys, values = cache
        batch, _, heads, head_dim = query.shape
        # two plain products read keys and values once; the masked kernels are made for longer queries
        query = query.view(batch, keys.shape[1], heads // keys.shape[1], head_dim)
        scores = (query @ keys.transpose(2, 3)).float() * head_dim**-0.5
        mixed = scores.masked_fill(unseen, -torch.inf).softmax(dim=-1).to(values.dtype) @ values
        return mixed.reshape(batch, 1, heads, head_dim)

    return _layers(model, token, position, caches, attend)


def _layers(model: Any, ids: Tensor, positions: Tensor, caches: Caches, attend: Any) -> Tensor:
    """All layers on ids and positions [B, S]; `attend` takes query, key and value as [B, S, heads, d]."""
    hidden = model.embed_tokens(ids)
    rotation = tuple(part.unsqueeze(2) for part in model.rotary_emb(hidden, positions))
    for layer, cache in zip(model.layers, caches, strict=True):
        module = layer.self_attn
        normed = layer.input_layernorm(hidden)
        query, key, value = (
            project(normed).unflatten(-1, (-1, cache[0].shape[3]))
            for project in (module.q_proj, module.k_proj, module.v_proj)
        )
        if hasattr(module, "q_norm"):
            query, key = module.q_norm(query), module.k_norm(key)
        mixed = attend(_rotate(query, rotation), _rotate(key, rotation), value, cache)
        hidden = hidden + module.o_proj(mixed.flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return hidden


def _rotate(states: Tensor, rotation: Any) -> Tensor:
    """Rotary embedding on [B, S, heads, d] with cos and sin [B, S, 1, d]."""
    cos, sin = rotation
    half = states.shape[-1] // 2
    turned = torch.cat((-states[..., half:], states[..., :half]), dim=-1)
    return states * cos + turned * sin
