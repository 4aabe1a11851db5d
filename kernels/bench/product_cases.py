"""The matrix products: whole ones in prefill, weight-only ones in decode."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

from qcompile.kernels.bench.cases import OPS, Case, Setting
from qcompile.kernels.gemv_int4 import reference as int4
from qcompile.kernels.gemv_int4.launch import MAX_ROWS
from qcompile.kernels.gemv_int8 import reference as int8
from qcompile.kernels.matmul_bias_residual.reference import reference as matmul_bias_residual
from qcompile.kernels.matmul_int8.reference import reference as matmul_int8

_GROUP = 128
_MIN_INT_MM_ROWS = 17  # torch._int_mm takes no fewer


def product_cases(s: Setting) -> Iterator[Case]:
    """out_proj and down_proj of the model, and a square product that fills the chip."""
    d, f, rows = s.dims.hidden_size, s.dims.intermediate_size, s.phase.tokens
    sizes = {"attention out": (rows, d, s.dims.num_attention_heads * s.dims.head_dim), "down": (rows, d, f)}
    if rows >= 4096:
        sizes["4096 square"] = (4096, 4096, 4096)
    for name, (m, n, k) in sizes.items():
        yield _matmul(s, f"{s.label}, {name}", m, n, k)
        yield _matmul_int8(s, f"{s.label}, {name}", m, n, k)
    if rows <= MAX_ROWS:
        for name, (n, k) in {"gate/up": (2 * f, d), "down": (d, f)}.items():
            yield _gemv_int8(s, f"{s.label}, {name}", rows, n, k)
            yield _gemv_int4(s, f"{s.label}, {name}", rows, n, k)


def _matmul(s: Setting, label: str, m: int, n: int, k: int) -> Case:
    return Case(
        "matmul_bias_residual",
        label,
        lambda: (s.randn(m, k), s.randn(n, k) / k**0.5, s.randn(n), s.randn(m, n)),
        OPS.matmul_bias_residual,
        lambda x, w, b, r: functional.linear(x, w, b) + r,
        lambda *a: matmul_bias_residual(*a, torch.float64),
        s.size * (m * k + n * k + 2 * m * n),
        2 * m * n * k,
        vendor=("matmul alone", lambda x, w, b, r: x @ w.T),
        extra={"vendor_computes_less": True},
    )


def _int8s(s: Setting, *shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, device=s.device)


def _scales(s: Setting, count: int) -> torch.Tensor:
    return torch.rand(count, device=s.device) / 1000 + 1e-4


def _matmul_int8(s: Setting, label: str, m: int, n: int, k: int) -> Case:
    def make() -> tuple[Any, ...]:
        return _int8s(s, m, k), _int8s(s, n, k), _scales(s, m), _scales(s, n), None, s.dtype

    def eager(x: torch.Tensor, w: torch.Tensor, xs: torch.Tensor, ws: torch.Tensor, _: None, dtype: torch.dtype) -> Any:
        if m < _MIN_INT_MM_ROWS:
            return (x.to(dtype) @ w.to(dtype).T * (xs[:, None] * ws)).to(dtype)
        return (torch._int_mm(x, w.T).float() * xs[:, None] * ws).to(dtype)

    return Case(
        "matmul_int8",
        label,
        make,
        OPS.matmul_int8,
        eager,
        lambda *a: matmul_int8(*a, torch.float64),
        m * k + n * k + s.size * m * n,
        2 * m * n * k,
        "int8",
        vendor=("_int_mm alone", lambda x, w, *_: torch._int_mm(x, w.T)) if m >= _MIN_INT_MM_ROWS else None,
        extra={"vendor_computes_less": True},
    )


def _gemv_int8(s: Setting, label: str, m: int, n: int, k: int) -> Case:
    def eager(x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor, _: None) -> torch.Tensor:
        return functional.linear(x, w.to(x.dtype)) * scale.to(x.dtype)

    return Case(
        "gemv_int8",
        label,
        lambda: (s.randn(m, k), _int8s(s, n, k), _scales(s, n), None),
        OPS.gemv_int8,
        eager,
        lambda *a: int8.reference(*a, torch.float64),
        n * k + s.size * m * (n + k) + 4 * n,
        vendor=(f"{s.size * 8}-bit weights", _plain_product(s, n, k)),
        extra={"vendor_computes_less": True},
    )


def _gemv_int4(s: Setting, label: str, m: int, n: int, k: int) -> Case:
    def make() -> tuple[Any, ...]:
        words = torch.randint(-(2**31), 2**31, (n, k // 8), dtype=torch.int32, device=s.device)
        return s.randn(m, k), words, _scales(s, n * k // _GROUP).to(s.dtype).view(n, -1), None

    def eager(x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor, _: None) -> torch.Tensor:
        q = int4.unpack(w, _GROUP).to(x.dtype) * scale.unsqueeze(-1)
        return functional.linear(x, q.flatten(1))

    return Case(
        "gemv_int4",
        label,
        make,
        OPS.gemv_int4,
        eager,
        lambda *a: int4.reference(*a, torch.float64),
        n * k // 2 + s.size * (n * k // _GROUP + m * (n + k)),
        vendor=(f"{s.size * 8}-bit weights", _plain_product(s, n, k)),
        extra={"vendor_computes_less": True},
    )


def _plain_product(s: Setting, n: int, k: int) -> Any:
    """The library's product with weights that are not quantized; made when first called."""
    weights: list[torch.Tensor] = []

    def product(x: torch.Tensor, *_: Any) -> torch.Tensor:
        if not weights:
            weights.append(s.randn(n, k))
        return functional.linear(x, weights[0])

    return product
