"""add_layer_norm and head_rms_norm; add_rms_norm has a file of its own."""

from types import SimpleNamespace

import pytest
import torch

from qcompile.errors import KernelError
from qcompile.kernels.add_layer_norm import launch as layer_norm
from qcompile.kernels.add_layer_norm.reference import reference as layer_norm_reference
from qcompile.kernels.head_rms_norm import launch as head_norm
from qcompile.kernels.head_rms_norm.reference import reference as head_norm_reference
from qcompile.kernels.placement import Launch
from tests.kernels.numerics import DTYPES, apart, assert_close, fresh, poisoned  # noqa: F401

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("poisoned")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 896), (5, 7), (2, 3, 64), (17, 130), (3, 1)])
def test_add_layer_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, residual = fresh(*shape, dtype=dtype), fresh(*shape, dtype=dtype)
    gamma, beta = fresh(shape[-1], dtype=dtype), fresh(shape[-1], dtype=dtype)
    want_y, want_h = layer_norm_reference(x, residual, gamma, beta, 1e-5, torch.float64)
    if len(shape) == 2:
        x = apart(x)
    for walk in (0, 1):
        tile = layer_norm.choose(x, shape[-1]).replace(WALK=walk)
        y, h = layer_norm.launch(x, residual, gamma, beta, 1e-5, tile)
        assert_close(y, want_y, dtype)
        assert torch.equal(h, want_h)


def test_a_large_mean_costs_no_digits() -> None:
    x = fresh(3, 200) + 1000.0
    zero, one = torch.zeros(3, 200), torch.ones(200)
    y, _ = layer_norm.launch(x, zero, one, torch.zeros(200), 1e-5)
    want, _ = layer_norm_reference(x, zero, one, torch.zeros(200), 1e-5, torch.float64)
    assert (y.double() - want).abs().max() < 1e-3  # fp32 has 6e-5 left of a value of 1000 beside 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 4, 32), (5, 7, 128), (1, 1, 896), (3, 14, 64), (2, 5, 33)])
def test_head_rms_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, gamma = fresh(*shape, dtype=dtype), fresh(shape[-1], dtype=dtype)
    want = head_norm_reference(x, gamma, 1e-6, torch.float64)
    assert_close(head_norm.launch(x, gamma, 1e-6), want, dtype)
    walking = head_norm.choose(x, 1, *shape[-2:]).replace(WALK=1)
    assert_close(head_norm.launch(x, gamma, 1e-6, walking), want, dtype)


def test_heads_are_taken_out_of_a_packed_projection() -> None:
    packed = fresh(2, 3, (4 + 2 + 2) * 16)
    q = packed[..., : 4 * 16].unflatten(-1, (4, 16))
    k = packed[..., 4 * 16 : 6 * 16].unflatten(-1, (2, 16))
    gamma = fresh(16)
    for x in (q, k):
        assert_close(head_norm.launch(x, gamma, 1e-6), head_norm_reference(x, gamma, 1e-6, torch.float64), x.dtype)


@pytest.mark.parametrize("walk", [0, 1])
def test_a_group_of_heads_that_ends_within_a_tile(walk: int) -> None:
    x, gamma = fresh(3, 5, 16), fresh(16)
    y = head_norm.launch(x, gamma, 1e-6, Launch({"BLOCK_ROWS": 4, "BLOCK_COLS": 32, "WALK": walk}))
    assert_close(y, head_norm_reference(x, gamma, 1e-6, torch.float64), x.dtype)


@pytest.mark.parametrize("tokens", [95, 1100])
def test_heads_that_leave_lanes_idle_are_one_list(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Tiles of 16 or 32 rows then have heads of several tokens, and the last one's are left over."""
    monkeypatch.setattr(head_norm, "choose", None)
    x, gamma = fresh(tokens, 7, 30, dtype=torch.float16), fresh(30, dtype=torch.float16)
    assert head_norm.is_one_list(x, 7, 30) is (tokens == 1100)
    monkeypatch.setattr(head_norm, "_LIST", (0, x.numel()))
    assert_close(head_norm.launch(x, gamma, 1e-6), head_norm_reference(x, gamma, 1e-6, torch.float64), x.dtype)


def test_which_heads_are_one_list() -> None:
    """Few would not gain by it, many and those of a wider tensor keep a tile for each token, as do those that fill one."""
    for tokens, heads, head_dim, is_one in (
        (16, 14, 64, False),
        (128, 14, 64, True),
        (4096, 14, 64, True),
        (32768, 14, 64, False),
        (128, 16, 64, False),
        (128, 28, 128, False),
    ):
        x = torch.empty(1, dtype=torch.float16).expand(tokens, heads, head_dim)
        assert not head_norm.is_one_list(x, heads, head_dim)
        packed = SimpleNamespace(device=x.device, numel=x.numel, is_contiguous=lambda: True)
        assert head_norm.is_one_list(packed, heads, head_dim) is is_one  # type: ignore[arg-type]
    assert head_norm.list_tile(128, 64).constants == {"BLOCK_ROWS": 8, "BLOCK_COLS": 64, "WALK": 0}
    assert head_norm.list_tile(4096, 64).constants == {"BLOCK_ROWS": 16, "BLOCK_COLS": 64, "WALK": 0}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(bad: float) -> None:
    x = fresh(3, 1, 16)
    x[1, 0, 4] = bad
    y = head_norm.launch(x, torch.ones(16), 1e-6)
    assert bool(y[1, 0, 4].isnan())
    assert bool(torch.isfinite(y[[0, 2]]).all())
    y, _ = layer_norm.launch(x[:, 0], torch.zeros(3, 16), torch.ones(16), torch.zeros(16), 1e-6)
    assert bool(y[1].isnan().all())
    assert bool(torch.isfinite(y[[0, 2]]).all())


def test_what_they_do_not_take() -> None:
    with pytest.raises(KernelError, match=r"add_layer_norm: beta is \[7\], wanted \[D\] = \[8\]"):
        layer_norm.launch(torch.ones(2, 8), torch.ones(2, 8), torch.ones(8), torch.ones(7), 1e-5)
    with pytest.raises(KernelError, match="heads must lie side by side"):
        head_norm.launch(torch.ones(2, 8, 3).transpose(1, 2), torch.ones(8), 1e-5)
    with pytest.raises(KernelError, match=r"wanted \[..., H, d\]"):
        head_norm.launch(torch.ones(8), torch.ones(8), 1e-5)
    with pytest.raises(KernelError, match="x is empty"):
        head_norm.launch(torch.ones(0, 2, 8), torch.ones(8), 1e-5)
    with pytest.raises(KernelError, match="mixed dtypes"):
        head_norm.launch(torch.ones(2, 2, 8), torch.ones(8).half(), 1e-5)
