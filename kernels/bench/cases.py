"""One measurement: an operator at a size, with those it is compared to, and the least it must move and compute."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

import qcompile.kernels.operators  # noqa: F401  (registers torch.ops.qcompile)
from qcompile.kernels.add_layer_norm.reference import reference as add_layer_norm
from qcompile.kernels.add_rms_norm.reference import reference as add_rms_norm
from qcompile.kernels.add_rms_norm_quantize.reference import reference as add_rms_norm_quantize
from qcompile.kernels.bench.shapes import Dims, Phase
from qcompile.kernels.head_rms_norm.reference import reference as head_rms_norm
from qcompile.kernels.quantize_per_token.reference import reference as quantize_per_token
from qcompile.kernels.swiglu.reference import reference as swiglu

OPS = torch.ops.qcompile
Function = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """An operator at a size.

    Attributes:
        operator: Name.
        label: Model and phase.
        make: Fresh random arguments, on the device, each time it is called.
        kernel: Takes them; so do all below.
        eager: Plain PyTorch in the same dtype; torch.compile compiles this one.
        exact: In float64.
        size_bytes: Least bytes through device memory.
        operations: Multiplications and additions on the matrix units; 0 where they are not what counts.
        rate: Whose rate bounds the operations: fp16 or int8.
        vendor: Name and function of a library's own operator, where there is one.
    """

    operator: str
    label: str
    make: Callable[[], tuple[Any, ...]]
    kernel: Function
    eager: Function
    exact: Function
    size_bytes: int
    operations: int = 0
    rate: str = "fp16"
    vendor: tuple[str, Function] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What all cases of a run share."""

    model: str
    dims: Dims
    phase: Phase
    device: torch.device
    dtype: torch.dtype

    @property
    def label(self) -> str:
        """Model and phase."""
        return f"{self.model} {self.phase.name}"

    def randn(self, *shape: int) -> torch.Tensor:
        """Random values of the dtype."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    @property
    def size(self) -> int:
        """Bytes an element."""
        return self.dtype.itemsize


def norm_cases(s: Setting) -> Iterator[Case]:
    """The norms."""
    rows, d = s.phase.tokens, s.dims.hidden_size
    heads, head_dim = s.dims.num_attention_heads, s.dims.head_dim
    yield Case(
        "add_rms_norm",
        s.label,
        lambda: (s.randn(rows, d), s.randn(rows, d), s.randn(d), 1e-6),
        OPS.add_rms_norm,
        _eager_add_rms_norm,
        lambda *a: add_rms_norm(*a, torch.float64),
        4 * rows * d * s.size,
        vendor=("F.rms_norm after +", _vendor_add_rms_norm),
    )
    yield Case(
        "add_layer_norm",
        s.label,
        lambda: (s.randn(rows, d), s.randn(rows, d), s.randn(d), s.randn(d), 1e-5),
        OPS.add_layer_norm,
        _eager_add_layer_norm,
        lambda *a: add_layer_norm(*a, torch.float64),
        4 * rows * d * s.size,
    )
    yield Case(
        "head_rms_norm",
        s.label,
        lambda: (s.randn(rows, heads, head_dim), s.randn(head_dim), 1e-6),
        OPS.head_rms_norm,
        head_rms_norm,
        lambda *a: head_rms_norm(*a, torch.float64),
        2 * rows * heads * head_dim * s.size,
        vendor=("F.rms_norm", lambda x, g, eps: functional.rms_norm(x, x.shape[-1:], g, eps)),
    )


def elementwise_cases(s: Setting) -> Iterator[Case]:
    """SwiGLU and int8 quantization."""
    rows, d, f = s.phase.tokens, s.dims.hidden_size, s.dims.intermediate_size
    yield Case(
        "quantize_per_token",
        s.label,
        lambda: (s.randn(rows, f),),
        OPS.quantize_per_token,
        quantize_per_token,
        lambda x: quantize_per_token(x, torch.float64),
        rows * f * (s.size + 1),
    )
    yield Case(
        "add_rms_norm_quantize",
        s.label,
        lambda: (s.randn(rows, d), s.randn(rows, d), s.randn(d), 1e-6),
        OPS.add_rms_norm_quantize,
        lambda x, r, g, eps: _quantized(*_eager_add_rms_norm(x, r, g, eps)),
        lambda *a: add_rms_norm_quantize(*a, torch.float64),
        rows * d * (3 * s.size + 1),
    )
    yield Case(
        "swiglu",
        s.label,
        lambda: (s.randn(rows, 2 * f),),
        OPS.swiglu,
        _eager_swiglu,
        lambda x: swiglu(x, torch.float64),
        3 * rows * f * s.size,
    )


def _eager_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, gamma: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As transformers writes it."""
    h = x + residual
    wide = h.float()
    return gamma * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype), h


def _vendor_add_rms_norm(x: torch.Tensor, residual: torch.Tensor, gamma: torch.Tensor, eps: float) -> Any:
    h = x + residual
    return functional.rms_norm(h, h.shape[-1:], gamma, eps), h


def _eager_add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    h = x + residual
    return functional.layer_norm(h, h.shape[-1:], gamma, beta, eps), h


def _quantized(y: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return *quantize_per_token(y), h


def _eager_swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return functional.silu(gate) * up
