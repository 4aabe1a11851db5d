"""The kernels as PyTorch operators: torch.ops.qcompile.<operator>, on CUDA and NPU by kernel, on the CPU by reference.

Importing this module registers them. They have shape functions, so torch.compile and CUDA graphs take them as they are; they
have no derivatives.
"""

from collections.abc import Callable
from typing import Any

import torch

from qcompile.kernels.add_layer_norm import launch as add_layer_norm
from qcompile.kernels.add_layer_norm.reference import reference as add_layer_norm_reference
from qcompile.kernels.add_rms_norm import launch as add_rms_norm
from qcompile.kernels.add_rms_norm.reference import reference as add_rms_norm_reference
from qcompile.kernels.add_rms_norm_quantize import launch as add_rms_norm_quantize
from qcompile.kernels.add_rms_norm_quantize.reference import reference as add_rms_norm_quantize_reference
from qcompile.kernels.decode_attention import launch as decode_attention
from qcompile.kernels.decode_attention.reference import reference as decode_attention_reference
from qcompile.kernels.gemv_int4 import launch as gemv_int4
from qcompile.kernels.gemv_int4.reference import reference as gemv_int4_reference
from qcompile.kernels.gemv_int8 import launch as gemv_int8
from qcompile.kernels.gemv_int8.reference import reference as gemv_int8_reference
from qcompile.kernels.head_rms_norm import launch as head_rms_norm
from qcompile.kernels.head_rms_norm.reference import reference as head_rms_norm_reference
from qcompile.kernels.matmul_bias_residual import launch as matmul_bias_residual
from qcompile.kernels.matmul_bias_residual.reference import reference as matmul_bias_residual_reference
from qcompile.kernels.matmul_int8 import launch as matmul_int8
from qcompile.kernels.matmul_int8.reference import reference as matmul_int8_reference
from qcompile.kernels.quantize_per_token import launch as quantize_per_token
from qcompile.kernels.quantize_per_token.reference import reference as quantize_per_token_reference
from qcompile.kernels.rope_cache import launch as rope_cache
from qcompile.kernels.rope_cache.reference import reference as rope_cache_reference
from qcompile.kernels.sampler import launch as sampler
from qcompile.kernels.sampler.reference import reference as sampler_reference
from qcompile.kernels.swiglu import launch as swiglu
from qcompile.kernels.swiglu.reference import reference as swiglu_reference

_Shapes = Callable[..., Any]


def _register(
    launcher: Any, reference: Callable[..., Any], schema: str, shapes: _Shapes, mutates: tuple[str, ...] = ()
) -> None:
    """Register one operator; the first arguments of its schema are the ones that the launcher's ``validate`` takes."""
    checked = launcher.validate.__code__.co_argcount

    operator = torch.library.custom_op(
        f"qcompile::{launcher.NAME}", launcher.launch, mutates_args=mutates, schema=schema
    )
    defaults = [one.default_value for one in getattr(torch.ops.qcompile, launcher.NAME).default._schema.arguments]

    def completed(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*arguments, *defaults[len(arguments) :])  # torch leaves out what has its default value

    def on_cpu(*arguments: Any) -> Any:
        complete = completed(arguments)
        launcher.validate(*complete[:checked])
        return reference(*complete)

    def without_values(*arguments: Any) -> Any:
        complete = completed(arguments)
        if not any(map(_is_symbolic, complete)):
            launcher.validate(*complete[:checked])
        return shapes(*complete)

    operator.register_kernel("cpu")(on_cpu)
    operator.register_fake(without_values)


def _is_symbolic(argument: Any) -> bool:
    """Whether it is or has a size that torch.compile leaves open: to check one is to fix it, so that waits for the run."""
    sizes = (*argument.shape, *argument.stride()) if isinstance(argument, torch.Tensor) else (argument,)
    return any(isinstance(size, (torch.SymInt, torch.SymFloat)) for size in sizes)


def _like(tensor: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype or tensor.dtype, device=tensor.device)


def _scale_of(x: torch.Tensor) -> torch.Tensor:
    return _like(x, *x.shape[:-1], dtype=torch.float32)


def _pair(x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _like(x, *x.shape), _like(x, *x.shape)


def _same(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return _like(x, *x.shape)


def _product(x: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return _like(x, *x.shape[:-1], weight.shape[0])


def _top(logits: torch.Tensor, top_k: int, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch = logits.shape[0]
    return (
        _like(logits, batch, top_k, dtype=torch.float32),
        _like(logits, batch, top_k, dtype=torch.int32),
        _like(logits, batch, dtype=torch.int32),
    )


_register(
    add_rms_norm,
    add_rms_norm_reference,
    "(Tensor x, Tensor residual, Tensor gamma, float eps) -> (Tensor, Tensor)",
    _pair,
)
_register(
    add_layer_norm,
    add_layer_norm_reference,
    "(Tensor x, Tensor residual, Tensor gamma, Tensor beta, float eps) -> (Tensor, Tensor)",
    _pair,
)
_register(head_rms_norm, head_rms_norm_reference, "(Tensor x, Tensor gamma, float eps) -> Tensor", _same)
_register(
    rope_cache,
    rope_cache_reference,
    "(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor positions, Tensor slots, Tensor(a!) k_cache, "
    "Tensor(b!) v_cache) -> Tensor",
    _same,
    ("k_cache", "v_cache"),
)
_register(swiglu, swiglu_reference, "(Tensor gate_up) -> Tensor", lambda x: _like(x, *x.shape[:-1], x.shape[-1] // 2))
_register(
    quantize_per_token,
    quantize_per_token_reference,
    "(Tensor x) -> (Tensor, Tensor)",
    lambda x: (_like(x, *x.shape, dtype=torch.int8), _scale_of(x)),
)
_register(
    add_rms_norm_quantize,
    add_rms_norm_quantize_reference,
    "(Tensor x, Tensor residual, Tensor gamma, float eps) -> (Tensor, Tensor, Tensor)",
    lambda x, *_: (_like(x, *x.shape, dtype=torch.int8), _scale_of(x), _like(x, *x.shape)),
)
_register(
    matmul_bias_residual,
    matmul_bias_residual_reference,
    "(Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None) -> Tensor",
    _product,
)
_register(
    matmul_int8,
    matmul_int8_reference,
    "(Tensor x, Tensor weight, Tensor x_scale, Tensor weight_scale, Tensor? bias, ScalarType out_dtype) -> Tensor",
    lambda x, weight, *rest: _like(x, *x.shape[:-1], weight.shape[0], dtype=rest[-1]),
)
_register(
    gemv_int8, gemv_int8_reference, "(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None) -> Tensor", _product
)
_register(
    gemv_int4, gemv_int4_reference, "(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None) -> Tensor", _product
)
_register(
    decode_attention,
    decode_attention_reference,
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor starts, Tensor lengths, float scale) -> Tensor",
    _same,
)
_register(
    sampler,
    sampler_reference,
    "(Tensor logits, int top_k=1, float temperature=1.0, Tensor? uniform=None) -> (Tensor, Tensor, Tensor)",
    lambda logits, top_k=1, temperature=1.0, uniform=None: _top(logits, top_k),
)
