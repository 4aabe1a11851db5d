"""The weights of a transformers Qwen2 or Qwen3, packed as the kernels want them.

The modules of the model keep their parameters, which become views into the packed ones: nothing is stored twice, and
state_dict, saving and unpatching go on as before.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qcompile.errors import KernelError
from qcompile.kernels.arguments import FLOATS

_MODELS = ("Qwen2ForCausalLM", "Qwen3ForCausalLM")
_MIN_HEAD_DIM = 16


@dataclass(frozen=True)
class PackedLayer:
    """One decoder layer.

    Attributes:
        input_norm: [D], before attention.
        qkv: [(H + 2 K) * d, D] and its bias.
        q_norm: [d], Qwen3 only; k_norm too.
        out: [D, H * d] and its bias.
        ffn_norm: [D], before the feed-forward block.
        gate_up: [2 F, D], gates first.
        down: [D, F].
    """

    input_norm: torch.Tensor
    qkv: tuple[torch.Tensor, torch.Tensor | None]
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    out: tuple[torch.Tensor, torch.Tensor | None]
    ffn_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


def require_supported(model: Any) -> None:
    """Require a plain Qwen2 or Qwen3 that the kernels compute.

    Raises:
        KernelError: Naming what is different and what is wanted.
    """
    name = type(model).__name__
    if name not in _MODELS:
        raise KernelError(f"patch: the model is a {name}; the kernels know {' and '.join(_MODELS)}")
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim < _MIN_HEAD_DIM or head_dim & (head_dim - 1):
        raise KernelError(f"patch: head_dim is {head_dim}; the kernels take powers of two from {_MIN_HEAD_DIM}")
    if config.hidden_act != "silu":
        raise KernelError(f"patch: hidden_act is {config.hidden_act}; the kernels compute silu")
    if "sliding_attention" in getattr(config, "layer_types", ()):
        raise KernelError("patch: layers with sliding-window attention; the kernels attend to the whole cache")
    if "dynamic" in model.model.rotary_emb.rope_type or model.model.rotary_emb.rope_type == "longrope":
        raise KernelError(
            f"patch: rope_type {model.model.rotary_emb.rope_type} depends on the length; the kernels use one table"
        )
    places = {(str(p.device), p.dtype) for p in model.parameters()}
    if len(places) != 1:
        raise KernelError(
            f"patch: parameters on several devices or in several dtypes ({sorted(map(str, places))}); load them in one"
        )
    ((device, dtype),) = places
    if dtype not in FLOATS or device == "meta":
        raise KernelError(
            f"patch: parameters are {dtype} on {device}; wanted float16, bfloat16 or float32 on a real device"
        )


class PackedPlaces:
    """Where the parameters of the layers lay when they were packed: other ones would not reach the kernels.

    What changes in place reaches them, so addresses are compared, not values.

    Args:
        model: After ``pack_layers``.
    """

    def __init__(self, model: Any) -> None:
        inner = model.model
        self._children = [(inner._modules, "layers", inner.layers, "model.layers")]
        self._parameters = []
        for path, module in inner.layers.named_modules(prefix="model.layers"):
            self._children += [
                (module._modules, name, child, f"{path}.{name}") for name, child in module._modules.items()
            ]
            self._parameters += [
                (module._parameters, name, _address(parameter), f"{path}.{name}")
                for name, parameter in module._parameters.items()
            ]

    def require_same_modules(self) -> None:
        """Require the modules that were there. Dictionaries are asked: attributes of modules are slow beside a decode step.

        Raises:
            KernelError: Naming the first that was replaced.
        """
        for children, name, child, path in self._children:
            if children.get(name) is not child:
                raise _replaced(path)

    def require_same_addresses(self) -> None:
        """Require the parameters of these modules where they lay; a microsecond a layer.

        Raises:
            KernelError: Naming the first that was replaced.
        """
        for parameters, name, address, path in self._parameters:
            if _address(parameters.get(name)) != address:
                raise _replaced(path)


def _address(parameter: torch.Tensor | None) -> int | None:
    return None if parameter is None else parameter.data_ptr()


def _replaced(path: str) -> KernelError:
    return KernelError(
        f"patched model: {path} was replaced after patch, and the kernels have the old weights; call "
        "qcompile.kernels.unpatch(model), then patch(model) again"
    )


def pack_layers(model: Any) -> list[PackedLayer]:
    """Pack q, k and v, and gate and up, of every layer."""
    return [_pack(layer, index) for index, layer in enumerate(model.model.layers)]


def _pack(layer: Any, index: int) -> PackedLayer:
    attention, ffn = layer.self_attn, layer.mlp
    _plain(index, attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    _plain(index, ffn.gate_proj, ffn.up_proj, ffn.down_proj)
    qkv_weight, qkv_bias = _join(attention.q_proj, attention.k_proj, attention.v_proj)
    gate_up, gate_up_bias = _join(ffn.gate_proj, ffn.up_proj)
    if gate_up_bias is not None or ffn.down_proj.bias is not None:
        raise KernelError(f"patch: the feed-forward block of layer {index} has biases, which no Qwen has")
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return PackedLayer(
        layer.input_layernorm.weight.data,
        (qkv_weight, qkv_bias),
        None if q_norm is None else q_norm.weight.data,
        None if k_norm is None else k_norm.weight.data,
        (attention.o_proj.weight.data, None if attention.o_proj.bias is None else attention.o_proj.bias.data),
        layer.post_attention_layernorm.weight.data,
        gate_up,
        ffn.down_proj.weight.data,
    )


def _plain(index: int, *modules: nn.Module) -> None:
    for module in modules:
        if type(module) is not nn.Linear:
            raise KernelError(
                f"patch: layer {index} has a {type(module).__name__} where a torch.nn.Linear is wanted; merge adapters and "
                "dequantize first"
            )


def _join(*linears: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight = _join_parameters([linear.weight for linear in linears])
    biases = [linear.bias for linear in linears if linear.bias is not None]
    if biases and len(biases) != len(linears):
        raise KernelError("patch: some of q_proj, k_proj and v_proj have a bias and some have none")
    return weight, _join_parameters(biases) if biases else None


def _join_parameters(parameters: list[nn.Parameter]) -> torch.Tensor:
    packed = torch.cat([parameter.data for parameter in parameters])
    first = 0
    for parameter in parameters:
        parameter.data = packed[first : first + len(parameter)]
        first += len(parameter)
    return packed
