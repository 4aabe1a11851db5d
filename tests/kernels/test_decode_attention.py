import pytest
import torch

from qcompile.errors import KernelError
from qcompile.kernels.decode_attention.launch import launch
from qcompile.kernels.decode_attention.reference import reference
from qcompile.kernels.placement import Launch
from tests.kernels.numerics import DTYPES, assert_close, fresh, poisoned  # noqa: F401

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("poisoned")]
SMALL = Launch({"BLOCK_G": 16, "BLOCK_T": 16, "D": 16})


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def caches(
    batch: int, kv_heads: int, capacity: int, head_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    return fresh(batch, kv_heads, capacity, head_dim, dtype=dtype), fresh(
        batch, kv_heads, capacity, head_dim, dtype=dtype
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(14, 2, 64), (4, 4, 16), (8, 1, 32), (17, 1, 16)])
@pytest.mark.parametrize("splits", [None, 1, 3, 5])
def test_ragged_lengths(dtype: torch.dtype, heads: tuple[int, int, int], splits: int | None) -> None:
    num_heads, kv_heads, head_dim = heads
    q = fresh(3, num_heads, head_dim, dtype=dtype)
    k, v = caches(3, kv_heads, 37, head_dim, dtype)
    starts, lengths = ints(0, 5, 36), ints(1, 33, 37)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):  # what is not attended to is poison
        k[row, :, :start], v[row, :, :start] = float("nan"), float("nan")
        k[row, :, length:], v[row, :, length:] = float("nan"), float("nan")
    want = reference(q, k, v, starts, lengths, head_dim**-0.5, torch.float64)
    tile = Launch({"BLOCK_G": 16 if num_heads // kv_heads <= 16 else 32, "BLOCK_T": 16, "D": head_dim})
    assert_close(launch(q, k, v, starts, lengths, head_dim**-0.5, tile, splits), want, dtype)


def test_the_tiles_chosen_for_it() -> None:
    q, (k, v) = fresh(2, 6, 64), caches(2, 2, 150, 64, torch.float32)
    starts, lengths = ints(0, 3), ints(150, 80)
    want = reference(q, k, v, starts, lengths, 0.125, torch.float64)
    assert_close(launch(q, k, v, starts, lengths, 0.125), want, torch.float32)


@pytest.mark.parametrize("splits", [1, 2])
def test_a_sequence_without_slots_gives_zeros(splits: int) -> None:
    q, (k, v) = fresh(2, 4, 16), caches(2, 2, 8, 16, torch.float32)
    out = launch(q, k, v, ints(0, 4), ints(0, 4), 0.25, splits=splits)
    assert torch.equal(out, torch.zeros(2, 4, 16))
    assert torch.equal(reference(q, k, v, ints(0, 4), ints(0, 4), 0.25), torch.zeros(2, 4, 16))


def test_a_cache_with_other_strides() -> None:
    q, (k, v) = fresh(2, 4, 16), caches(2, 2, 8, 16, torch.float32)
    want = reference(q, k, v, ints(0, 0), ints(8, 5), 0.25, torch.float64)
    k, v = (one.transpose(1, 2).contiguous().transpose(1, 2) for one in (k, v))
    assert_close(launch(q, k, v, ints(0, 0), ints(8, 5), 0.25), want, torch.float32)


@pytest.mark.parametrize("splits", [1, 2])
def test_large_scores_do_not_overflow(splits: int) -> None:
    q, (k, v) = fresh(1, 2, 16) * 100, caches(1, 1, 20, 16, torch.float32)
    want = reference(q, k, v, ints(0), ints(20), 1.0, torch.float64)
    got = launch(q, k, v, ints(0), ints(20), 1.0, SMALL, splits)
    assert (got.double() - want).abs().max() < 1e-3  # scores of 1000 have 6e-5 left


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # numpy's, in the interpreter
@pytest.mark.parametrize("splits", [1, 2])
def test_nan_in_a_slot_attended_to_is_seen(splits: int) -> None:
    q, (k, v) = fresh(2, 2, 16), caches(2, 1, 20, 16, torch.float32)
    k[0, 0, 3, 0] = float("nan")
    out = launch(q, k, v, ints(0, 0), ints(20, 20), 1.0, SMALL, splits)
    assert bool(out[0].isnan().all())
    assert bool(torch.isfinite(out[1]).all())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lengths": ints(9, 1)}, "lengths has values 1 ... 9, wanted 0 ... 8"),
        ({"starts": ints(-1, 1)}, "starts has values -1"),
        ({"lengths": ints(1)}, r"lengths is int32 \[1\]"),
        ({"lengths": torch.tensor([1, 1])}, "lengths is int64"),
        ({"q": torch.ones(2, 3, 16)}, "3 query heads over 2 key heads"),
        ({"q": torch.ones(2, 4, 8)}, "d is 8"),
        ({"q": torch.ones(2, 4, 16).half()}, "mixed dtypes"),
        ({"q": torch.ones(4, 16)}, r"wanted \[B, H, d\]"),
        ({"v_cache": torch.ones(2, 2, 7, 16)}, "v_cache is"),
        ({"v_cache": torch.ones(2, 8, 2, 16).transpose(1, 2)}, "strides"),
        ({"q": torch.ones(0, 4, 16)}, "q is empty"),
    ],
)
def test_what_it_does_not_take(changed: dict[str, torch.Tensor], message: str) -> None:
    given = {"q": torch.ones(2, 4, 16), "k_cache": torch.ones(2, 2, 8, 16), "v_cache": torch.ones(2, 2, 8, 16)}
    given |= {"starts": ints(0, 0), "lengths": ints(8, 8)}
    with pytest.raises(KernelError, match=message):
        launch(**(given | changed), scale=1.0)
