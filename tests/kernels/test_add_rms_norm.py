import pytest
import torch

from qcompile.errors import KernelError
from qcompile.kernels.add_rms_norm.launch import launch
from qcompile.kernels.add_rms_norm.reference import reference
from qcompile.kernels.placement import Launch
from tests.kernels.numerics import DTYPES, apart, assert_close, fresh, poisoned  # noqa: F401

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("poisoned")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 896), (5, 7), (2, 3, 64), (17, 130), (3, 1)])
@pytest.mark.parametrize("spread", [False, True], ids=["packed", "strided"])
def test_numbers(dtype: torch.dtype, shape: tuple[int, ...], spread: bool) -> None:
    x, residual, gamma = fresh(*shape, dtype=dtype), fresh(*shape, dtype=dtype), fresh(shape[-1], dtype=dtype)
    want_y, want_h = reference(x, residual, gamma, 1e-6, torch.float64)
    if spread and len(shape) == 2:
        x, residual = apart(x), apart(residual, 5)
    y, h = launch(x, residual, gamma, 1e-6)
    assert_close(y, want_y, dtype)
    assert torch.equal(h, want_h)


@pytest.mark.parametrize("walk", [0, 1])
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_every_tile_computes_the_same(rows: int, walk: int) -> None:
    x, residual, gamma = fresh(9, 100), fresh(9, 100), fresh(100)
    y, h = launch(x, residual, gamma, 1e-5, Launch({"BLOCK_ROWS": rows, "BLOCK_COLS": 128, "WALK": walk}))
    assert_close(y, reference(x, residual, gamma, 1e-5, torch.float64)[0], x.dtype)
    assert torch.equal(h, x + residual)


def test_misaligned_memory_is_taken() -> None:
    flat = fresh(1 + 3 * 33, dtype=torch.float16)
    x, gamma = flat[1:].view(3, 33), fresh(33, dtype=torch.float16)
    y, _ = launch(x, x, gamma, 1e-6)
    assert_close(y, reference(x, x, gamma, 1e-6, torch.float64)[0], torch.float16)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(bad: float) -> None:
    x = fresh(3, 16)
    x[1, 4] = bad
    y, h = launch(x, torch.zeros_like(x), torch.ones(16), 1e-6)
    want_y, want_h = reference(x, torch.zeros_like(x), torch.ones(16), 1e-6)
    assert torch.allclose(y, want_y, equal_nan=True)
    assert torch.equal(h[1, 4].isnan(), want_h[1, 4].isnan())
    assert bool(torch.isfinite(y[[0, 2]]).all())


def arguments(**changed: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"x": torch.ones(2, 8), "residual": torch.ones(2, 8), "gamma": torch.ones(8)} | changed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"residual": torch.ones(2, 9)}, r"residual is \[2, 9\], wanted .* \[2, 8\]"),
        ({"gamma": torch.ones(9)}, r"gamma is \[9\]"),
        ({"gamma": torch.ones(8).half()}, "mixed dtypes.*gamma float16"),
        ({"x": torch.ones(8, 2).T}, r"elements of a row are 2 apart.*contiguous\(\)"),
        (
            {"x": torch.ones(2, 3, 4).transpose(0, 1), "residual": torch.ones(3, 2, 4), "gamma": torch.ones(4)},
            "row stride",
        ),
        ({"gamma": torch.ones(16)[::2]}, "gamma .* not contiguous"),
        ({"x": torch.ones(0, 8), "residual": torch.ones(0, 8)}, "x is empty"),
        ({"x": torch.ones(2, 8, device="meta")}, "different devices"),
        ({name: value.double() for name, value in arguments().items()}, "float64.*takes float16, bfloat16, float32"),
        (
            {"x": torch.ones(1, 1 << 17), "residual": torch.ones(1, 1 << 17), "gamma": torch.ones(1 << 17)},
            "at most 65536",
        ),
    ],
)
def test_what_it_does_not_take(changed: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        launch(**arguments(**changed), eps=1e-6)
