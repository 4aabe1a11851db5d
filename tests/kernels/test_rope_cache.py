from typing import Any

import pytest
import torch

from qcompile.errors import KernelError
from qcompile.kernels.placement import Launch
from qcompile.kernels.rope_cache.launch import launch
from qcompile.kernels.rope_cache.reference import reference
from tests.kernels.numerics import DTYPES, assert_close, fresh, poisoned  # noqa: F401

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("poisoned")]


def arguments(
    batch: int, length: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """A packed QKV output taken apart, tokens in the last slots but one, and the first token of each row left out."""
    packed = fresh(batch, length, (heads + 2 * kv_heads) * head_dim, dtype=dtype).unflatten(-1, (-1, head_dim))
    capacity = length + 3
    angles = torch.arange(40.0)[:, None] * 0.1 ** torch.arange(head_dim // 2)
    slots = torch.arange(2, 2 + length, dtype=torch.int32).repeat(batch)
    slots[::length] = -1
    return {
        "q": packed[:, :, :heads],
        "k": packed[:, :, heads : heads + kv_heads],
        "v": packed[:, :, heads + kv_heads :],
        "cos": angles.cos(),
        "sin": angles.sin(),
        "positions": torch.arange(batch * length, dtype=torch.int32) % 40,
        "slots": slots,
        "k_cache": torch.full((batch, kv_heads, capacity, head_dim), 7.0, dtype=dtype),
        "v_cache": torch.full((batch, kv_heads, capacity, head_dim), 7.0, dtype=dtype),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 14, 2, 64), (2, 5, 4, 2, 16), (3, 2, 3, 3, 32), (1, 4, 7, 1, 128)])
def test_numbers(dtype: torch.dtype, shape: tuple[int, int, int, int, int]) -> None:
    given = arguments(*shape, dtype=dtype)
    expected = {**given, "k_cache": given["k_cache"].double(), "v_cache": given["v_cache"].double()}
    expected |= {name: given[name].double() for name in ("q", "k", "v")}
    want = reference(**expected, compute=torch.float64)
    assert_close(launch(**given), want, dtype)
    assert_close(given["k_cache"], expected["k_cache"], dtype)
    assert torch.equal(given["v_cache"], expected["v_cache"].to(dtype))
    assert bool((given["k_cache"][:, :, :2] == 7.0).all()), "slots that nobody named were written"


def test_a_cache_with_other_strides() -> None:
    given = arguments(2, 3, 4, 2, 16)
    want = {**given, "k_cache": given["k_cache"].clone(), "v_cache": given["v_cache"].clone()}
    reference(**want)
    for name in ("k_cache", "v_cache"):
        given[name] = given[name].transpose(1, 2).contiguous().transpose(1, 2)
    launch(**given)
    assert_close(given["k_cache"], want["k_cache"].double(), torch.float32)
    assert torch.equal(given["v_cache"], want["v_cache"])


def test_more_heads_than_a_tile_has() -> None:
    given = arguments(1, 3, 7, 3, 16)
    want = reference(**{**given, "k_cache": given["k_cache"].clone(), "v_cache": given["v_cache"].clone()})
    assert_close(launch(**given, tile=Launch({"BLOCK_HEADS": 2, "HALF": 8})), want.double(), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 14, 2, 64), (2, 5, 4, 2, 16), (3, 2, 3, 3, 32)])
@pytest.mark.parametrize("tile", [{"BLOCK_ROWS": 8}, {"BLOCK_HEADS": 16}], ids=["rows of one list", "heads of a token"])
def test_either_kernel(dtype: torch.dtype, shape: tuple[int, int, int, int, int], tile: dict[str, int]) -> None:
    given = arguments(*shape, dtype=dtype)
    want = {**given, "k_cache": given["k_cache"].clone(), "v_cache": given["v_cache"].clone()}
    out = reference(**want)
    assert_close(launch(**given, tile=Launch({**tile, "HALF": shape[-1] // 2})), out.double(), dtype)
    assert_close(given["k_cache"], want["k_cache"].double(), dtype)
    assert torch.equal(given["v_cache"], want["v_cache"])


def test_nan_stays_in_its_token() -> None:
    given = arguments(1, 3, 2, 1, 16)
    given["q"][0, 1, 0, 0] = float("nan")
    out = launch(**given)
    assert bool(out[0, 1, 0].isnan().any())
    assert bool(torch.isfinite(out[0, [0, 2]]).all())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("positions", torch.full((6,), 40, dtype=torch.int32), r"positions has values 40 ... 40, wanted 0 ... 39"),
        ("slots", torch.full((6,), 6, dtype=torch.int32), "slots has values 6"),
        ("slots", torch.zeros(6, dtype=torch.int64), "slots is int64"),
        ("positions", torch.zeros(5, dtype=torch.int32), r"positions is int32 \[5\], wanted int32 \[6\]"),
        ("cos", torch.ones(40, 16), r"cos is \[40, 16\]"),
        ("cos", torch.ones(40, 8).half(), "mixed dtypes"),
        ("v_cache", torch.ones(2, 2, 7, 16), "v_cache is"),
        ("v_cache", torch.ones(2, 6, 2, 16).transpose(1, 2), "strides"),
        ("k", torch.ones(2, 3, 2, 8), r"k is \[2, 3, 2, 8\]"),
        ("k", torch.ones(2, 3, 2, 16).half(), "mixed dtypes"),
        ("q", torch.ones(2, 3, 16, 4).transpose(2, 3), "side by side"),
        ("q", torch.ones(2, 3, 64), r"wanted \[B, S, H, d\]"),
    ],
)
def test_what_it_does_not_take(name: str, value: torch.Tensor, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        launch(**{**arguments(2, 3, 4, 2, 16), name: value})


def test_head_sizes_that_are_no_power_of_two() -> None:
    with pytest.raises(KernelError, match="d is 12; this operator takes powers of two"):
        launch(**arguments(1, 2, 2, 1, 12))
