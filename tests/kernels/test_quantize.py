"""quantize_per_token and add_rms_norm_quantize: equal but for rounding ties."""

import pytest
import torch

from qcompile.errors import KernelError
from qcompile.kernels.add_rms_norm_quantize import launch as fused
from qcompile.kernels.add_rms_norm_quantize.reference import reference as fused_reference
from qcompile.kernels.placement import Launch
from qcompile.kernels.quantize_per_token.launch import launch
from qcompile.kernels.quantize_per_token.reference import reference
from tests.kernels.numerics import DTYPES, apart, assert_close, fresh, poisoned  # noqa: F401

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("poisoned")]
_TIE = 1e-4  # how far from a half a value may be for its rounding to depend on the last bits of fp32


def assert_equal_but_for_ties(q: torch.Tensor, x: torch.Tensor, scale: torch.Tensor) -> None:
    exact = x.double() / scale.double().unsqueeze(-1)
    differs = q.double() != torch.round(exact)
    distance = ((exact - torch.floor(exact)) - 0.5).abs()
    assert bool((distance[differs] < _TIE).all())
    assert differs.double().mean() < 0.01
    assert (q.double() - exact).abs().max() <= 0.5 + _TIE


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 896), (5, 7), (2, 3, 64), (17, 130), (3, 1)])
@pytest.mark.parametrize(("block", "long_rows"), [(None, False), (1024, False), (32, True)])
def test_quantize(dtype: torch.dtype, shape: tuple[int, ...], block: int | None, long_rows: bool) -> None:
    x = fresh(*shape, dtype=dtype)
    given = apart(x) if len(shape) == 2 else x
    q, scale = launch(given, Launch({"BLOCK_COLS": block}) if block else None, long_rows)
    want_q, want_scale = reference(x, torch.float64)
    assert_close(scale, want_scale, torch.float32)
    assert_equal_but_for_ties(q, x, want_scale)
    assert int((q != want_q).sum()) <= q.numel() // 100


@pytest.mark.parametrize(
    ("columns", "pieces", "block"), [(7, 1, 4), (300, 4, 64), (300, 1, 256), (512, 1, 256), (1, 1, 1)]
)
def test_rows_in_pieces(columns: int, pieces: int, block: int) -> None:
    x = fresh(5, columns)
    x[1] = 0.0
    x[2, -1] = float("nan")
    x[3, 0] = float("-inf")
    q, scale = launch(apart(x), Launch({"PIECES": pieces, "BLOCK_COLS": block}))
    want_q, want_scale = reference(x)
    assert torch.equal(q, want_q)
    assert torch.equal(scale.isnan(), want_scale.isnan())
    assert torch.allclose(scale, want_scale, rtol=1e-6, atol=0.0, equal_nan=True)


def test_ties_go_to_the_even_number() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0]])
    q, scale = launch(x)
    assert scale.item() == 1.0
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -127]]


@pytest.mark.parametrize("long_rows", [False, True])
def test_rows_of_zeros_and_rows_that_are_not_finite(long_rows: bool) -> None:
    x = fresh(4, 16)
    x[0] = 0.0
    x[1, 3] = float("nan")
    x[2, 5] = float("-inf")
    q, scale = launch(x, Launch({"BLOCK_COLS": 16}), long_rows)
    want_q, want_scale = reference(x)
    assert torch.equal(q, want_q)
    assert bool(scale[0] > 0)
    assert not q[0].any()
    assert bool(scale[1].isnan())
    assert bool(scale[2].isinf())
    assert torch.equal(scale[3], want_scale[3])


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # numpy's, in the interpreter
@pytest.mark.parametrize("walk", [0, 1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_fused_form_says_so_in_the_scale_too(bad: float, walk: int) -> None:
    x = fresh(3, 16)
    x[1, 2] = bad
    tile = Launch({"BLOCK_COLS": 16, "WALK": walk})
    q, scale, _ = fused.launch(x, torch.zeros(3, 16), torch.ones(16), 1e-6, tile)
    assert bool(scale[1].isnan())
    assert not q[1].any()
    assert bool(torch.isfinite(scale[[0, 2]]).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 896), (5, 7), (2, 3, 64), (17, 130)])
@pytest.mark.parametrize("walk", [0, 1])
def test_add_rms_norm_quantize(dtype: torch.dtype, shape: tuple[int, ...], walk: int) -> None:
    x, residual, gamma = fresh(*shape, dtype=dtype), fresh(*shape, dtype=dtype), fresh(shape[-1], dtype=dtype)
    want_q, want_scale, want_h = fused_reference(x, residual, gamma, 1e-6, torch.float64)
    tile = fused.choose(x, shape[-1]).replace(WALK=walk)
    q, scale, h = fused.launch(apart(x) if len(shape) == 2 else x, residual, gamma, 1e-6, tile)
    assert torch.equal(h, want_h)
    assert_close(scale, want_scale, torch.float32)
    assert int((q.int() - want_q.int()).abs().max()) <= 1
    assert int((q != want_q).sum()) <= max(1, q.numel() // 100)


def test_what_they_do_not_take() -> None:
    with pytest.raises(KernelError, match="quantize_per_token: x is empty"):
        launch(torch.ones(0, 4))
    with pytest.raises(KernelError, match="quantize_per_token: x int8"):
        launch(torch.ones(2, 4, dtype=torch.int8))
    with pytest.raises(KernelError, match="add_rms_norm_quantize: gamma is"):
        fused.launch(torch.ones(2, 4), torch.ones(2, 4), torch.ones(5), 1e-6)
    with pytest.raises(KernelError, match="add_rms_norm_quantize: rows of 131072"):
        fused.launch(torch.ones(1, 1 << 17), torch.ones(1, 1 << 17), torch.ones(1 << 17), 1e-6)
