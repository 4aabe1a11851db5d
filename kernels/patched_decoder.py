"""The decoder of a patched model: transformers' interface outside, the fused operators inside."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn import functional

import qcompile.kernels.operators  # noqa: F401  (registers torch.ops.qcompile)
from qcompile.errors import KernelError
from qcompile.export.torch_tracer import cache_argument
from qcompile.kernels.attended import Attended, attended
from qcompile.kernels.decode_graph import Capture, DecodeGraph, capture_cuda
from qcompile.kernels.packed_layers import PackedLayer, PackedPlaces, pack_layers

_OPS = torch.ops.qcompile
_Turns = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class _Underivable(torch.autograd.Function):
    """The identity, which refuses to go back: gradients of the last layer alone would look like training."""

    @staticmethod
    def forward(context: Any, hidden: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        """Return hidden; parameter makes the result part of a graph when it is trained."""
        del context, parameter
        return hidden.view_as(hidden)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> Any:
        """Refuse."""
        raise KernelError(
            "patched model: the kernels have no derivatives; call qcompile.kernels.unpatch(model) to train"
        )


class PatchedDecoder:
    """Computes what ``model.model.forward`` computes.

    A StaticCache is written in place; any other cache goes through its own ``update``. On CUDA the decode step over a
    StaticCache is captured in a graph.

    Args:
        model: A supported Qwen2ForCausalLM or Qwen3ForCausalLM.
        use_graph: Capture decode steps where possible.
        capture: How; tests put something else here.
    """

    def __init__(self, model: Any, use_graph: bool, capture: Capture | None = None) -> None:
        self._inner = model.model
        self._config = model.config
        self._layers = pack_layers(model)
        self._places = PackedPlaces(model)
        self._head_dim = self._inner.layers[0].self_attn.head_dim
        self._inv_freq = self._inner.rotary_emb.inv_freq.float()
        self._device, self._dtype = self._layers[0].down.device, self._layers[0].down.dtype
        self._cache_name = cache_argument(self._inner)
        self._capture = capture or (capture_cuda if use_graph and self._device.type == "cuda" else None)
        self._graphs: WeakKeyDictionary[Any, DecodeGraph] = WeakKeyDictionary()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        **others: Any,
    ) -> Any:
        """What ``model.model`` gives: last_hidden_state [B, S, D] and the cache.

        Raises:
            KernelError: Something asked for that the kernels do not give, a model in training mode, or one whose weights
                were replaced.
        """
        from transformers.modeling_outputs import BaseModelOutputWithPast

        self._require_possible(input_ids, inputs_embeds, others)
        self._places.require_same_modules()
        hidden = self._inner.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if hidden.device != self._device or hidden.dtype != self._dtype:
            raise KernelError(
                f"patched model: it was patched in {self._dtype} on {self._device} and is given {hidden.dtype} on "
                f"{hidden.device}; move a model first, then patch it"
            )
        use_cache = self._config.use_cache if use_cache is None else use_cache
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = _new_cache(self._config)
        batch, length = hidden.shape[:2]
        seen = 0 if cache is None else cache.get_seq_length()
        where = attended(batch, length, seen, attention_mask, position_ids, hidden.device)
        with torch.no_grad():
            hidden = self._run(hidden, where, cache, seen)
        self._places.require_same_addresses()  # not before: now a device has work meanwhile
        if torch.is_grad_enabled():
            hidden = _Underivable.apply(hidden, self._inner.norm.weight)
        return BaseModelOutputWithPast(last_hidden_state=hidden, **{self._cache_name: cache if use_cache else None})

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be copied or pickled: the copy's parameters would be views into nothing that its kernels read."""
        raise KernelError(
            "patched model: it cannot be copied or pickled; call qcompile.kernels.unpatch(model) first, and patch the copy"
        )

    def _require_possible(self, input_ids: Any, inputs_embeds: Any, others: dict[str, Any]) -> None:
        if (input_ids is None) == (inputs_embeds is None):
            raise KernelError("patched model: pass exactly one of input_ids and inputs_embeds")
        if (input_ids if inputs_embeds is None else inputs_embeds).numel() == 0:
            raise KernelError("patched model: no tokens")
        if self._inner.training:
            raise KernelError(
                "patched model: it is in training mode, and the kernels have no derivatives; call model.eval()"
            )
        for name in ("output_attentions", "output_hidden_states"):
            if others.get(name) or getattr(self._config, name, False):
                raise KernelError(
                    f"patched model: {name} is not given by the kernels; call qcompile.kernels.unpatch(model)"
                )

    def _run(self, hidden: torch.Tensor, where: Attended, cache: Any, seen: Any) -> torch.Tensor:
        static = _static_layers(cache, len(self._layers))
        if static is None:
            return self._layers_over(hidden, where, cache, None, seen)
        for layer in static:
            if not layer.is_initialized:
                empty = hidden.new_empty((len(hidden), self._config.num_key_value_heads, 0, self._head_dim))
                layer.lazy_initialization(empty, empty)
        if not isinstance(seen, torch.Tensor) or not seen.is_cuda:
            _require_room(int(seen) + hidden.shape[1], static[0].keys.shape[2])
        if self._capture is not None and where.starts is not None and hidden.shape[1] == 1:
            hidden = self._replay(hidden, where, cache, static)
        else:
            hidden = self._layers_over(hidden, where, cache, static, seen)
        torch._foreach_add_([layer.cumulative_length for layer in static], where.slots.numel() // len(hidden))
        return hidden

    def _replay(self, hidden: torch.Tensor, where: Attended, cache: Any, static: list[Any]) -> torch.Tensor:
        assert self._capture is not None
        assert where.starts is not None
        assert where.lengths is not None
        inputs = {"hidden": hidden, "positions": where.positions, "slots": where.slots}
        inputs |= {"starts": where.starts, "lengths": where.lengths}
        graph = self._graphs.get(cache)
        if graph is None:

            def step(given: Any) -> torch.Tensor:
                place = Attended(given["positions"], given["slots"], given["starts"], given["lengths"], None)
                return self._layers_over(given["hidden"], place, None, static, None)

            graph = self._graphs[cache] = DecodeGraph(step, inputs, self._capture)
        return graph.run(inputs)

    def _layers_over(self, hidden: torch.Tensor, where: Attended, cache: Any, static: Any, seen: Any) -> torch.Tensor:
        eps = self._config.rms_norm_eps
        residual = None
        turns = self._turns(where.positions)
        for index, layer in enumerate(self._layers):
            hidden, residual = _norm(hidden, residual, layer.input_norm, eps)
            hidden = self._attention(layer, hidden, where, turns, cache, static and static[index], index, seen)
            hidden, residual = _norm(hidden, residual, layer.ffn_norm, eps)
            hidden = functional.linear(_OPS.swiglu(functional.linear(hidden, layer.gate_up)), layer.down)
        return _norm(hidden, residual, self._inner.norm.weight.data, eps)[0]

    def _turns(self, positions: torch.Tensor) -> _Turns:
        """cos and sin, float32 [B * S, d / 2], a row a token, and the number of each row, int32 [B * S].

        Made from the positions in every call, as the model does: a table would have an end, and a device would have to stop to
        say whether positions lie beyond it.
        """
        angles = positions.float()[:, None] * self._inv_freq
        scaling = self._inner.rotary_emb.attention_scaling
        rows = torch.arange(len(positions), dtype=torch.int32, device=positions.device)
        return angles.cos() * scaling, angles.sin() * scaling, rows

    def _attention(
        self,
        layer: PackedLayer,
        hidden: torch.Tensor,
        where: Attended,
        turns: _Turns,
        cache: Any,
        static: Any,
        index: int,
        seen: Any,
    ) -> torch.Tensor:
        batch, length, _ = hidden.shape
        heads, kv_heads = self._config.num_attention_heads, self._config.num_key_value_heads
        qkv = functional.linear(hidden, *layer.qkv).unflatten(-1, (heads + 2 * kv_heads, self._head_dim))
        q, k, v = qkv.split([heads, kv_heads, kv_heads], 2)
        if layer.q_norm is not None:
            q = _OPS.head_rms_norm(q, layer.q_norm, self._config.rms_norm_eps)
            k = _OPS.head_rms_norm(k, layer.k_norm, self._config.rms_norm_eps)
        if static is not None:
            q = _OPS.rope_cache(q, k, v, *turns, where.slots, static.keys, static.values)
            keys, values = static.keys, static.values
        else:
            q, keys, values = self._update(q, k, v, turns, cache, index)
        out = self._attend(q, keys, values, where, seen)
        return functional.linear(out.reshape(batch, length, -1), *layer.out)

    def _update(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, turns: _Turns, cache: Any, index: int) -> Any:
        batch, length, kv_heads, head_dim = k.shape
        keys, values = (k.new_empty((batch, kv_heads, length, head_dim)) for _ in range(2))
        slots = torch.arange(length, dtype=torch.int32, device=q.device).repeat(batch)
        q = _OPS.rope_cache(q, k, v, *turns, slots, keys, values)
        if cache is not None:
            keys, values = cache.update(keys, values, index)
        return q, keys, values

    def _attend(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, where: Attended, seen: Any
    ) -> torch.Tensor:
        scale = self._head_dim**-0.5
        if where.starts is not None:
            return _OPS.decode_attention(q[:, 0], keys, values, where.starts, where.lengths, scale)
        total = q.shape[1] + int(seen) if where.mask is None else min(where.mask.shape[-1], keys.shape[2])
        mask = None if where.mask is None else where.mask[..., :total]
        out = functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            keys[:, :, :total],
            values[:, :, :total],
            attn_mask=mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype),
            is_causal=mask is None,
            scale=scale,
            enable_gqa=True,
        )
        return out.transpose(1, 2)


def _norm(
    hidden: torch.Tensor, residual: torch.Tensor | None, gamma: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if residual is None:
        return _OPS.head_rms_norm(hidden.unsqueeze(-2), gamma, eps).squeeze(-2), hidden
    normed, total = _OPS.add_rms_norm(hidden, residual, gamma, eps)
    return normed, total


def _new_cache(config: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=config)


def _static_layers(cache: Any, count: int) -> list[Any] | None:
    """The layers of a cache that is written in place; None for every other kind."""
    from transformers import StaticCache, cache_utils

    layers = list(getattr(cache, "layers", ()))
    kind = getattr(cache_utils, "StaticLayer", None)
    if len(layers) == count and kind is not None and all(type(layer) is kind for layer in layers):
        if hasattr(layers[0], "cumulative_length"):
            return layers
    elif not isinstance(cache, StaticCache):
        return None
    raise KernelError(
        "patched model: this StaticCache does not count its tokens; use transformers 5.17 or newer, or a DynamicCache"
    )


def _require_room(wanted: int, capacity: int) -> None:
    if wanted > capacity:
        raise KernelError(
            f"patched model: {wanted} tokens in a StaticCache for {capacity}; make it with a larger max_cache_len"
        )
