"""Batched generation for Qwen2 and Qwen3 in PyTorch: one static KV cache, decode steps as a CUDA graph.

transformers' generate() launches every kernel of every step from Python; at these model sizes that is most of the
time. Rows of different length share a batch: every row writes at its own position, padding is never attended to.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_PREFILL_ROWS = 512
_CHECK_EVERY = 16


@dataclass
class _Buffers:
    """What a step reads and writes, at fixed addresses: B rows, T positions, N new tokens."""

    keys: list[Tensor]  # per layer [B, K, T, d]
    values: list[Tensor]
    token: Tensor  # [B, 1]
    position: Tensor  # [B, 1], where `token` goes
    is_done: Tensor  # [B]
    output: Tensor  # [B, N]
    step: Tensor  # [1]
    graph: Any = None


class Generator:
    """Generates with a frozen copy of a model.

    Args:
        model: A Qwen2 or Qwen3 for causal language modelling; its weights are copied.
        stop_ids: Token ids that end a row; the end token is kept in the result.
        dtype: bfloat16 on an accelerator, float32 where results must equal the exported model's.
    """

    def __init__(self, model: Any, stop_ids: set[int], *, device: Any, dtype: torch.dtype) -> None:
        own = type(model)(model.config)  # not a deep copy: trainers hang hooks on the model they train
        own.load_state_dict(model.state_dict())
        self._model = own.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self._device, self._dtype = torch.device(device), dtype
        self._stop = torch.tensor(sorted(stop_ids), device=device)
        self._buffers: dict[tuple[int, int, int, float], _Buffers] = {}
        self._width = 0

    def update(self, model: Any) -> None:
        """Take over a model's current weights, in place, so captured graphs stay valid."""
        state = model.state_dict()
        with torch.no_grad():
            for name, tensor in self._model.state_dict().items():
                tensor.copy_(state[name])

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def generate(
        self, prompts: list[list[int]], *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0, rows: int = 0
    ) -> list[list[int]]:
        """Continue every prompt; greedy at temperature 0.

        Args:
            prompts: Token ids.
            max_new_tokens: The most tokens to generate.
            temperature: Of sampling.
            seed: Of sampling.
            rows: Rows per batch; 0 takes all prompts at once. The last batch is filled up with copies.
        """
        rows = min(rows or len(prompts), len(prompts))
        longest = max(map(len, prompts))
        self._width = max(self._width, -(-(longest + max_new_tokens) // 64) * 64)  # a new width costs a new graph
        torch.manual_seed(seed)
        results: list[list[int]] = []
        for start in range(0, len(prompts), rows):
            batch = prompts[start : start + rows]
            filled = batch + [batch[0]] * (rows - len(batch))
            output = self._generate_batch(filled, self._width, max_new_tokens, temperature)
            results.extend(self._trimmed(row) for row in output[: len(batch)].tolist())
        return results

    def _trimmed(self, row: list[int]) -> list[int]:
        stops = set(self._stop.tolist())
        end = next((i for i, token in enumerate(row) if token in stops), len(row) - 1)
        return row[: end + 1]

    def _generate_batch(self, prompts: list[list[int]], width: int, new: int, temperature: float) -> Tensor:
        key = (len(prompts), width, new, temperature)
        if key not in self._buffers:
            self._buffers.clear()  # one size at a time: the cache is what fills the device
            self._buffers[key] = self._allocate(*key[:3])
        buffers = self._buffers[key]
        buffers.step.zero_()
        buffers.is_done.zero_()
        buffers.output.fill_(int(self._stop[0]))
        for start in range(0, len(prompts), _PREFILL_ROWS):
            self._prefill(buffers, prompts[start : start + _PREFILL_ROWS], start, temperature)
        self._store(buffers)
        if buffers.graph is None and self._device.type == "cuda":
            buffers.graph = self._capture(buffers, temperature)
        for step in range(1, new):
            if step % _CHECK_EVERY == 0 and bool(buffers.is_done.all()):
                break
            buffers.graph.replay() if buffers.graph else self._decode(buffers, temperature)
        return buffers.output

    def _allocate(self, rows: int, width: int, new: int) -> _Buffers:
        config = self._model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (rows, config.num_key_value_heads, width, head_dim)

        def cache() -> list[Tensor]:
            return [torch.zeros(shape, device=self._device, dtype=self._dtype) for _ in range(config.num_hidden_layers)]

        def whole(*size: int) -> Tensor:
            return torch.zeros(size, device=self._device, dtype=torch.long)

        done = torch.zeros(rows, device=self._device, dtype=torch.bool)
        return _Buffers(cache(), cache(), whole(rows, 1), whole(rows, 1), done, whole(rows, new), whole(1))

    def _prefill(self, buffers: _Buffers, prompts: list[list[int]], start: int, temperature: float) -> None:
        """Fill the cache for some rows; padding stands on the right and is overwritten by later tokens."""
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self._device)
        longest = max(map(len, prompts))
        ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=self._device)
        positions = torch.arange(longest, device=self._device).expand(len(prompts), -1)
        stop = start + len(prompts)
        keys = [key[start:stop] for key in buffers.keys]
        values = [value[start:stop] for value in buffers.values]
        hidden = self._forward(ids, positions, keys, values)
        last = hidden[torch.arange(len(prompts), device=self._device), lengths - 1]
        buffers.token[start:stop] = self._choose(last, temperature)
        buffers.position[start:stop, 0] = lengths

    def _decode(self, buffers: _Buffers, temperature: float) -> None:
        hidden = self._forward(buffers.token, buffers.position, buffers.keys, buffers.values)
        buffers.token.copy_(self._choose(hidden[:, 0], temperature))
        buffers.position.add_(1)
        self._store(buffers)

    def _store(self, buffers: _Buffers) -> None:
        """Write the chosen tokens into column `step`; finished rows get the stop token."""
        buffers.token.masked_fill_(buffers.is_done[:, None], int(self._first_stop))
        buffers.output.scatter_(1, buffers.step.expand(buffers.output.shape[0], 1), buffers.token)
        buffers.is_done |= (buffers.token == self._stop).any(dim=-1)
        buffers.step.add_(1)

    @property
    def _first_stop(self) -> int:
        if not hasattr(self, "_first_stop_id"):
            self._first_stop_id = int(self._stop[0])
        return self._first_stop_id

    def _choose(self, hidden: Tensor, temperature: float) -> Tensor:
        logits = self._model.lm_head(self._model.model.norm(hidden)).float()
        if temperature > 0:  # the Gumbel trick: argmax(logits / t + g) draws from softmax(logits / t)
            logits = logits / temperature - torch.empty_like(logits).exponential_().log()
        return logits.argmax(dim=-1, keepdim=True)

    def _forward(self, ids: Tensor, positions: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        """ids, positions [B, S] -> hidden [B, S, D] before the last norm; writes the rows' keys and values."""
        model = self._model.model
        hidden = model.embed_tokens(ids)
        rotation = tuple(part.unsqueeze(2) for part in model.rotary_emb(hidden, positions))
        width = keys[0].shape[2]
        group = self._model.config.num_attention_heads // keys[0].shape[1]
        mask = torch.arange(width, device=ids.device) <= positions[:, :, None]  # [B, S, T]
        mask = mask[:, None, None].expand(-1, 1, group, -1, -1).flatten(2, 3)  # [B, 1, group * S, T]
        rows = torch.arange(ids.shape[0], device=ids.device)[:, None]
        for layer, key, value in zip(model.layers, keys, values, strict=True):
            normed = layer.input_layernorm(hidden)
            hidden = hidden + self._attend(layer.self_attn, normed, rotation, (rows, positions), mask, key, value)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return hidden

    def _attend(
        self, module: Any, hidden: Tensor, rotation: Any, where: Any, mask: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        batch, length, _ = hidden.shape
        kv_heads, head_dim = keys.shape[1], keys.shape[3]
        query, key, value = (
            project(hidden).view(batch, length, -1, head_dim)
            for project in (module.q_proj, module.k_proj, module.v_proj)
        )
        if hasattr(module, "q_norm"):
            query, key = module.q_norm(query), module.k_norm(key)
        query, key = _rotate(query, rotation), _rotate(key, rotation)
        rows, positions = where
        keys[rows, :, positions] = key
        values[rows, :, positions] = value
        group = query.shape[2] // kv_heads
        query = query.view(batch, length, kv_heads, group, head_dim).permute(0, 2, 3, 1, 4)
        query = query.reshape(batch, kv_heads, group * length, head_dim)
        if length > 1:
            mixed = functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        else:  # two plain products read keys and values once; the masked kernels are made for longer queries
            scores = (query @ keys.transpose(2, 3)).float() * head_dim**-0.5
            mixed = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1).to(values.dtype) @ values
        mixed = mixed.view(batch, kv_heads, group, length, head_dim).permute(0, 3, 1, 2, 4)
        return module.o_proj(mixed.reshape(batch, length, -1))

    def _capture(self, buffers: _Buffers, temperature: float) -> Any:
        """Record one decode step; the state it changes is put back afterwards."""
        state = (buffers.token, buffers.position, buffers.is_done, buffers.output, buffers.step)
        saved = [tensor.clone() for tensor in state]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._decode(buffers, temperature)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._decode(buffers, temperature)
        for tensor, before in zip(state, saved, strict=True):
            tensor.copy_(before)
        return graph


def _rotate(states: Tensor, rotation: Any) -> Tensor:
    """Rotary embedding on [B, S, heads, d] with cos and sin [B, S, 1, d]."""
    cos, sin = rotation
    half = states.shape[-1] // 2
    turned = torch.cat((-states[..., half:], states[..., :half]), dim=-1)
    return states * cos + turned * sin
