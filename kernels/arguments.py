"""What every operator asks of its tensors, with the error when it is not so."""

import os
from collections.abc import Mapping, Sequence

import torch
from torch._subclasses import FakeTensor

from qcompile.errors import KernelError

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
VARIANTS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
LIMIT = 1 << 31


def is_interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def fail(operator: str, message: str) -> KernelError:
    """The error, named after the operator."""
    return KernelError(f"{operator}: {message}")


def one_device(operator: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Require that all tensors are on one device."""
    devices = {name: str(tensor.device) for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        raise fail(operator, f"tensors on different devices ({_listing(devices)}); move them to one")


def launchable(operator: str, tensor: torch.Tensor) -> None:
    """Require a device that kernels run on: cuda, npu, or the CPU under Triton's interpreter.

    Launchers import their kernel after this: Triton decides at the import whether a kernel is interpreted or compiled.
    """
    kind = tensor.device.type
    if kind not in ("cuda", "npu") and not (kind == "cpu" and is_interpreted()):
        raise fail(
            operator,
            f"a kernel runs on cuda or npu, not on {kind}; use torch.ops.qcompile.{operator}, which computes the "
            "reference there, or set TRITON_INTERPRET=1 before triton is imported",
        )


def dtype_of(
    operator: str, tensors: Mapping[str, torch.Tensor], allowed: Sequence[torch.dtype] = FLOATS
) -> torch.dtype:
    """Require one dtype of the allowed ones for all tensors; returns it."""
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    if len(set(dtypes.values())) > 1:
        raise fail(operator, f"mixed dtypes ({_listing(dtypes)}); they must be the same")
    dtype = next(iter(tensors.values())).dtype
    if dtype not in allowed:
        names = ", ".join(str(one).removeprefix("torch.") for one in allowed)
        raise fail(operator, f"{_listing(dtypes)}; this operator takes {names}")
    return dtype


def shape_of(operator: str, name: str, tensor: torch.Tensor, wanted: Sequence[int], letters: str) -> None:
    """Require a shape, described by dim letters such as ``T, D``."""
    if tuple(tensor.shape) != tuple(wanted):
        raise fail(operator, f"{name} is {_shape(tensor)}, wanted [{letters}] = {list(wanted)}")


def not_empty(operator: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Require at least one element in every tensor."""
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            raise fail(operator, f"{name} is empty ({_shape(tensor)})")


def contiguous(operator: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Require row-major tensors without gaps."""
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise fail(
                operator,
                f"{name} {_shape(tensor)} is not contiguous (strides {list(tensor.stride())}); call .contiguous()",
            )


def as_rows(operator: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """View [..., D] as [rows, D]; rows may lie apart (a slice of a wider tensor), elements of a row may not."""
    if tensor.dim() == 0:
        raise fail(operator, f"{name} is a scalar, wanted [..., D]")
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise fail(
            operator, f"{name} {_shape(tensor)}: elements of a row are {tensor.stride(-1)} apart; call .contiguous()"
        )
    try:
        rows = tensor.view(-1, tensor.shape[-1])
    except RuntimeError:
        raise fail(
            operator,
            f"{name} {_shape(tensor)} with strides {list(tensor.stride())} has no single row stride; call .contiguous()",
        ) from None
    if rows.shape[0] >= LIMIT or rows.stride(0) >= LIMIT:
        raise fail(operator, f"{name} {_shape(tensor)} has more than 2**31 - 1 rows or elements in a row")
    return rows


def as_tokens(operator: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """View [..., H, d] as [tokens, H * d]: a token's heads lie side by side, tokens may lie apart."""
    if tensor.dim() < 2:
        raise fail(operator, f"{name} is {_shape(tensor)}, wanted [..., H, d]")
    heads, head_dim = tensor.shape[-2:]
    if (tensor.stride(-1) != 1 and head_dim > 1) or (tensor.stride(-2) != head_dim and heads > 1):
        raise fail(
            operator,
            f"{name} {_shape(tensor)} with strides {list(tensor.stride())}: a token's heads must lie side by side; "
            "call .contiguous()",
        )
    lead = tensor.shape[:-2]
    return as_rows(operator, name, tensor.as_strided((*lead, heads * head_dim), (*tensor.stride()[:-2], 1)))


def residual_norm(
    operator: str, x: torch.Tensor, residual: torch.Tensor, parameters: Mapping[str, torch.Tensor]
) -> None:
    """Require x and residual [..., D] and parameters [D] of one float dtype on one device."""
    tensors = {"x": x, "residual": residual, **parameters}
    one_device(operator, tensors)
    dtype_of(operator, tensors)
    not_empty(operator, tensors)
    as_rows(operator, "x", x)
    shape_of(operator, "residual", residual, x.shape, "..., D")
    for name, tensor in parameters.items():
        shape_of(operator, name, tensor, x.shape[-1:], "D")
    contiguous(operator, parameters)
    as_rows(operator, "residual", residual)


def few_rows(operator: str, x: torch.Tensor, most: int) -> None:
    """Require x [..., K] of so many rows at most."""
    num_rows = as_rows(operator, "x", x).shape[0]
    if num_rows > most:
        raise fail(
            operator, f"x has {num_rows} rows; this operator takes at most {most} (prefill: dequantize and multiply)"
        )


def cache_layout(operator: str, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    """Require equal strides of both caches [B, K, T, d] and elements of a head side by side."""
    if k_cache.stride(-1) != 1 or k_cache.stride() != v_cache.stride():
        raise fail(
            operator,
            f"k_cache has strides {list(k_cache.stride())}, v_cache {list(v_cache.stride())}; wanted the same, ending in 1",
        )
    if max(k_cache.stride()) >= LIMIT:
        raise fail(operator, f"k_cache {_shape(k_cache)} has a stride of 2**31 elements or more")


def integers(operator: str, tensors: Mapping[str, torch.Tensor], length: int) -> None:
    """Require contiguous int32 vectors of that length."""
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int32 or tuple(tensor.shape) != (length,):
            raise fail(
                operator,
                f"{name} is {str(tensor.dtype).removeprefix('torch.')} {_shape(tensor)}, wanted int32 [{length}]",
            )
    contiguous(operator, tensors)


def within(operator: str, name: str, tensor: torch.Tensor, lowest: int, bound: int) -> None:
    """Require lowest <= values < bound and no NaN, where there are values and looking does not stop a device: on the CPU."""
    if tensor.device.type == "cpu" and tensor.numel() and not isinstance(tensor, FakeTensor):
        least, most = tensor.min().item(), tensor.max().item()
        if not (least >= lowest and most < bound):
            last = f"less than {bound}" if tensor.is_floating_point() else bound - 1
            raise fail(operator, f"{name} has values {least} ... {most}, wanted {lowest} ... {last}")


def power_of_two(operator: str, name: str, number: int, least: int) -> None:
    """Require a power of two that is at least so large."""
    if number < least or number & (number - 1):
        raise fail(operator, f"{name} is {number}; this operator takes powers of two from {least}")


def _listing(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _shape(tensor: torch.Tensor) -> str:
    return str(list(tensor.shape))
