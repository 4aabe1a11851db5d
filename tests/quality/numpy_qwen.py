"""Qwen2 in float64 NumPy, written from the paper formulas: the reference that shares nothing with graphs or kernels."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def forward(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], ids: np.ndarray) -> np.ndarray:
    """Return the logits [S, V] of one row of tokens, all at once."""
    w = {name: np.asarray(t, np.float64) for name, t in tensors.items()}
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    d = config["hidden_size"] // heads
    h = w["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}"
        x = rms_norm(h, w[f"{p}.input_layernorm.weight"], config["rms_norm_eps"])
        q, k, v = (
            x @ w[f"{p}.self_attn.{n}_proj.weight"].T + w[f"{p}.self_attn.{n}_proj.bias"] for n in ("q", "k", "v")
        )
        q = rotate(split(q, heads, d), config["rope_theta"])
        k = rotate(split(k, kv_heads, d), config["rope_theta"])
        k, v = (np.repeat(t, heads // kv_heads, axis=0) for t in (k, split(v, kv_heads, d)))
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(d)
        scores = np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf)
        attended = softmax(scores) @ v
        h = h + attended.transpose(1, 0, 2).reshape(len(ids), -1) @ w[f"{p}.self_attn.o_proj.weight"].T
        x = rms_norm(h, w[f"{p}.post_attention_layernorm.weight"], config["rms_norm_eps"])
        gate, up = x @ w[f"{p}.mlp.gate_proj.weight"].T, x @ w[f"{p}.mlp.up_proj.weight"].T
        h = h + (gate / (1 + np.exp(-gate)) * up) @ w[f"{p}.mlp.down_proj.weight"].T
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return rms_norm(h, w["model.norm.weight"], config["rms_norm_eps"]) @ head.T


def rms_norm(x: np.ndarray, gamma: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * gamma


def split(x: np.ndarray, heads: int, d: int) -> np.ndarray:
    return x.reshape(len(x), heads, d).transpose(1, 0, 2)


def rotate(x: np.ndarray, theta: float) -> np.ndarray:
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] / theta ** (np.arange(half) / half)
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def kl_per_row(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """KL(softmax(a) || softmax(b)), by the definition."""
    p, q = softmax(a), softmax(b)
    return (p * np.log(p / q)).sum(axis=-1)


def nll(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return -np.log(softmax(logits)[np.arange(len(tokens)), tokens])
