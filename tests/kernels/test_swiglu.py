import pytest
import torch

from qcompile.errors import KernelError
from qcompile.kernels.placement import Launch
from qcompile.kernels.swiglu.launch import choose, launch
from qcompile.kernels.swiglu.reference import reference
from tests.kernels.numerics import DTYPES, apart, assert_close, fresh, poisoned  # noqa: F401

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("poisoned")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 9728), (5, 6), (2, 3, 320), (7, 2), (4, 2050)])
def test_numbers(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = fresh(*shape, dtype=dtype)
    want = reference(x, torch.float64)
    given = apart(x) if len(shape) == 2 else x
    assert_close(launch(given), want, dtype)
    assert_close(launch(given, choose(x, 1, shape[-1] // 2).replace(WALK=1)), want, dtype)


@pytest.mark.parametrize("walk", [0, 1])
def test_rows_in_several_blocks(walk: int) -> None:
    x = fresh(5, 2 * 300)
    assert_close(launch(x, Launch({"BLOCK_COLS": 64, "WALK": walk, "ONCE": 0})), reference(x, torch.float64), x.dtype)


def test_only_where_the_second_axis_has_room_has_the_grid_two() -> None:
    x = fresh(1, 2)
    assert choose(x, 65_535, 18944).constants["WALK"] == 0
    assert choose(x, 65_536, 18944).constants["WALK"] == 1


def test_gates_far_from_zero_neither_overflow_nor_lose_their_sign() -> None:
    gate = torch.tensor([[-1000.0, -90.0, 90.0, 1000.0]])
    out = launch(torch.cat([gate, torch.ones_like(gate)], -1))
    assert torch.allclose(out, torch.tensor([[0.0, 0.0, 90.0, 1000.0]]), atol=1e-30)
    out = launch(torch.tensor([[float("nan"), float("inf"), 1.0, 1.0]]))
    assert bool(out[0, 0].isnan())
    assert bool(out[0, 1].isinf())


def test_what_it_does_not_take() -> None:
    with pytest.raises(KernelError, match="swiglu: gate_up has rows of 7, an odd number"):
        launch(torch.ones(2, 7))
    with pytest.raises(KernelError, match="empty"):
        launch(torch.ones(2, 0))
    with pytest.raises(KernelError, match="int32"):
        launch(torch.ones(2, 8, dtype=torch.int32))
    with pytest.raises(KernelError, match="2 apart"):
        launch(torch.ones(8, 2).T)
