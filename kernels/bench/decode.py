"""Decode tokens a second of whole models with random weights: transformers, torch.compile, patched, patched with graph."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qcompile.export.torch_tracer import cache_argument
from qcompile.kernels import patch, unpatch
from qcompile.kernels.bench.shapes import Dims

VARIANTS = ("eager", "torch.compile", "patched", "patched + graph")
_PROMPT = 128
_WARM_UP = 8


def random_model(dims: Dims, device: torch.device, dtype: torch.dtype) -> Any:
    """A Qwen2ForCausalLM of these sizes whose weights are made on the device."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=dims.hidden_size,
        intermediate_size=dims.intermediate_size,
        num_attention_heads=dims.num_attention_heads,
        num_key_value_heads=dims.num_key_value_heads,
        vocab_size=dims.vocab_size,
        num_hidden_layers=dims.num_hidden_layers,
        tie_word_embeddings=dims.tie_word_embeddings,
        max_position_embeddings=4096,
        head_dim=dims.head_dim,
    )
    with torch.device(device):
        return Qwen2ForCausalLM(config).to(dtype).eval()


def measure_variants(model: Any, batch: int, new_tokens: int, is_timed: bool = True) -> dict[str, dict[str, Any]]:
    """Tokens a second of each variant on the same prompt, and how many tokens agree with eager's.

    Args:
        model: Unpatched, on its device.
        batch: Sequences.
        new_tokens: Decoded after the prompt; the first few warm up and are not timed.
        is_timed: Without: only the tokens, and no torch.compile.
    """
    prompt = torch.randint(0, model.config.vocab_size, (batch, _PROMPT), device=model.device)
    results: dict[str, dict[str, Any]] = {}
    for name in VARIANTS if is_timed else (VARIANTS[0], *VARIANTS[2:]):
        if name.startswith("patched"):
            patch(model, graph=name == VARIANTS[3])
        step = torch.compile(model, mode="reduce-overhead") if name == "torch.compile" else model
        tokens, seconds = decode(model, step, _cache(model, name, prompt.shape[1] + new_tokens), prompt, new_tokens)
        torch._dynamo.reset()
        if name.startswith("patched"):
            unpatch(model)
        results[name] = {"tokens": tokens}
        if is_timed:
            results[name]["tokens_per_s"] = batch * (new_tokens - _WARM_UP) / seconds
    for result in results.values():
        result["agree"] = float((result["tokens"] == results[VARIANTS[0]]["tokens"]).float().mean())
    return {name: {k: v for k, v in result.items() if k != "tokens"} for name, result in results.items()}


def _cache(model: Any, variant: str, capacity: int) -> Any:
    """What each variant would be used with: transformers' default for eager, a cache that stays in place for the others."""
    from transformers import DynamicCache, StaticCache

    if variant == VARIANTS[0]:
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=capacity)


@torch.no_grad()
def decode(
    model: Any, step: Callable[..., Any], cache: Any, prompt: torch.Tensor, new_tokens: int
) -> tuple[torch.Tensor, float]:
    """Greedy tokens [B, new_tokens] by the plainest loop, and the seconds of those after the warm-up."""
    batch, length = prompt.shape
    cached = {cache_argument(model): cache, "use_cache": True}
    ids = model(prompt, logits_to_keep=1, **cached).logits[:, -1].argmax(-1, keepdim=True)
    tokens = [ids]
    begin = 0.0
    for index in range(1, new_tokens):
        if index == _WARM_UP:
            _wait(prompt.device)
            begin = time.perf_counter()
        position = torch.full((batch, 1), length + index - 1, device=prompt.device)
        ids = step(ids, position_ids=position, **cached).logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(ids.clone())
    _wait(prompt.device)
    return torch.cat(tokens, 1), time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of the weights that a decode step reads: all but the embedding, which it reads a row of, unless it is tied."""
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    is_tied = embedding is model.get_output_embeddings().weight  # type: ignore[operator]
    return total if is_tied else total - embedding.numel() * embedding.element_size()
