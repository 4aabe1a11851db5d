"""Shared by the numeric tests: fresh inputs, poisoned memory, limits by dtype."""

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs triton (Linux): its interpreter runs the kernels")

LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
DTYPES = (torch.float32, torch.float16)  # Triton's interpreter rounds bfloat16 wrongly; tests/kernel_check has it


def fresh(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random values that no other run has seen; pytest prints the seed of a failing test."""
    seed = int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def apart(tensor: torch.Tensor, gap: int = 3) -> torch.Tensor:
    """The same values as the left part of wider rows, the rest NaN: what a slice of a packed tensor looks like."""
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + gap), float("nan"), dtype=tensor.dtype)
    wide[..., : tensor.shape[-1]] = tensor
    return wide[..., : tensor.shape[-1]]


def assert_close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    """Relative to the largest value wanted: an error in a small element of a row is an error of the row's sum."""
    assert got.shape == want.shape
    got, want = got.double(), want.double()
    assert bool(torch.isfinite(got).all()), "an element was not written, or is not finite"
    error = (got - want).abs().max() / want.abs().max().clamp_min(1e-30)
    assert error <= LIMITS[dtype], f"{error:.2e} for {dtype}"


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty and torch.empty_like return NaN (or -77), so what a kernel does not write is seen.

    NaN and inf in masked lanes or in a test's inputs are no reason for numpy, which interprets, to warn.
    """
    empty = torch.empty

    def filled(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -77)

    monkeypatch.setattr(torch, "empty", lambda *size, **options: filled(empty(*size, **options)))
    monkeypatch.setattr(
        torch, "empty_like", lambda like: filled(empty(like.shape, dtype=like.dtype, device=like.device))
    )
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        yield
