import pytest
import torch

from qcompile.errors import KernelError
from qcompile.kernels.placement import Launch
from qcompile.kernels.sampler.launch import launch
from qcompile.kernels.sampler.reference import reference
from tests.kernels.numerics import DTYPES, apart, fresh, poisoned  # noqa: F401

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("poisoned")]
SMALL = (Launch({"BLOCK_VOCAB": 64}), Launch({"BLOCK_CANDIDATES": 256, "BLOCK_K": 8}))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1000), (3, 517), (2, 5)])
@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("tiles", [None, SMALL], ids=["chosen", "small"])
def test_values_ids_and_token(
    dtype: torch.dtype, shape: tuple[int, int], top_k: int, tiles: tuple[Launch, Launch] | None
) -> None:
    logits, uniform = fresh(*shape, dtype=dtype), torch.rand(shape[0])
    values, ids, token = launch(apart(logits), top_k, 0.7, uniform, tiles)
    want_values, want_ids, want_token = reference(logits, top_k, 0.7, uniform)
    assert torch.equal(values, want_values)
    assert torch.equal(ids, want_ids)
    assert torch.equal(token, want_token)


def test_a_real_vocabulary() -> None:
    logits = fresh(2, 151_936)
    values, ids, token = launch(logits)
    assert torch.equal(ids[:, 0].long(), logits.argmax(-1))
    assert torch.equal(values[:, 0], logits.amax(-1))
    assert torch.equal(token, ids[:, 0])


def test_of_equal_logits_the_smaller_id_wins_across_chunks() -> None:
    logits = torch.zeros(1, 300)
    logits[0, [70, 3, 299]] = 1.0
    _, ids, token = launch(logits, 5, 1.0, None, SMALL)
    assert ids.tolist() == [[3, 70, 299, 0, 1]]
    assert token.tolist() == [3]


def test_of_equal_logits_the_smaller_id_wins_in_a_greedy_choice() -> None:
    """Twins within a block, in another block of the same part, and in another part."""
    logits = torch.zeros(1, 151_936)
    for twins in ([700, 70_000, 71_000], [2_051, 2_050], [151_935, 1_025, 1]):
        logits.zero_()[0, twins] = 1.0
        values, ids, token = launch(logits)
        assert (values.tolist(), ids.tolist(), token.tolist()) == ([[1.0]], [[min(twins)]], [min(twins)])
    assert launch(logits.zero_())[2].tolist() == [0]


@pytest.mark.parametrize("batch", [1, 3])
def test_the_first_of_many_equal_logits_lie_in_the_chosen_segments(batch: int) -> None:
    """Few distinct values: twins within a segment, in other segments of a block, in other blocks and parts."""
    generator = torch.Generator().manual_seed(batch)
    logits = torch.randint(-2, 3, (batch, 20_000), generator=generator).float()
    logits[logits == 0] *= -1.0  # -0 equals 0
    logits[:, 1::7] = 0.0
    values, ids, token = launch(logits, 30, 1.0, torch.full((batch,), 0.5))
    wanted = reference(logits, 30, 1.0, torch.full((batch,), 0.5))
    assert torch.equal(ids, wanted[1])
    assert torch.equal(values, wanted[0])
    assert torch.equal(token, wanted[2])
    rare = torch.full((batch, 20_000), -1.0)
    rare[:, [5, 6, 7, 1029, 19_999]] = torch.tensor([0.0, -0.0, 0.0, -0.0, 0.0])
    assert launch(rare, 6)[1].tolist() == [[5, 6, 7, 1029, 19_999, 0]] * batch


@pytest.mark.parametrize("shape", [(1, 151_936), (2, 1_024), (2, 1_025), (5, 64), (2, 40_000)])
def test_every_top_k_of_rows_in_one_part_or_many(shape: tuple[int, int]) -> None:
    logits = fresh(*shape)
    for top_k in (2, 20, 64):
        _, ids, _ = launch(logits, top_k)
        assert torch.equal(ids, reference(logits, top_k, 1.0, None)[1])


@pytest.mark.parametrize("step", [1, 4, 512, 1_024], ids=["neighbours", "segments", "groups", "blocks"])
def test_the_first_of_a_row_may_all_lie_together(step: int) -> None:
    """In as few segments, or groups of them, as can be: all but the best of each come in by turns of their own."""
    logits = fresh(2, 70_000).clamp(-8, 8)
    first = 37 + step * torch.randperm(64)
    logits[:, first] = 10.0 + torch.arange(64, 0, -1) // 2  # in pairs of equal ones
    for top_k in (3, 20, 64):
        values, ids, _ = launch(logits, top_k)
        wanted = reference(logits, top_k, 1.0, None)
        assert torch.equal(ids, wanted[1])
        assert torch.equal(values, wanted[0])


def test_nan_counts_as_minus_infinity_in_a_greedy_choice() -> None:
    logits = torch.full((3, 3000), float("nan"))
    logits[0, 2999], logits[1, 5] = -7.0, float("inf")
    values, ids, _ = launch(logits)
    assert ids.tolist() == [[2999], [5], [0]]
    assert values.tolist() == [[-7.0], [float("inf")], [-float("inf")]]


def test_more_rows_than_the_second_axis_of_a_grid_holds_go_through_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = fresh(3, 300)
    wanted = launch(logits)
    monkeypatch.setattr("qcompile.kernels.placement._SECOND_AXIS", 2)
    monkeypatch.delattr("qcompile.kernels.sampler.launch.greedy")
    monkeypatch.delattr("qcompile.kernels.sampler.launch.by_segments")
    assert all(torch.equal(*pair) for pair in zip(launch(logits), wanted, strict=True))
    launch(logits, 4)
    with pytest.raises(NameError, match="greedy"):
        launch(logits[:2])
    with pytest.raises(NameError, match="by_segments"):
        launch(logits[:2], 4)


def test_draws_follow_the_probabilities() -> None:
    logits = torch.log(torch.tensor([0.1, 0.2, 0.7])).expand(50, 3).contiguous()
    uniform = (torch.arange(50) + 0.5) / 50
    _, _, token = launch(logits, 3, 1.0, uniform)
    assert torch.bincount(token, minlength=3).tolist() == [5, 10, 35]


def test_nan_counts_as_minus_infinity() -> None:
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[nan, 1.0, nan, 0.5], [nan, nan, nan, nan], [-inf, -inf, 2.0, -inf], [1.0, inf, nan, 0.0]])
    _, ids, token = launch(logits, 3)
    assert ids.tolist() == [[1, 3, 0], [0, 1, 2], [2, 0, 1], [1, 0, 3]]
    assert token.tolist() == [1, 0, 2, 1]
    assert torch.equal(ids, reference(logits, 3, 1.0, torch.zeros(4))[1])


@pytest.mark.parametrize(
    ("logits", "options", "message"),
    [
        (torch.ones(2, 8), {"top_k": 9}, "top_k is 9; this operator takes 1 ... 8"),
        (torch.ones(2, 8), {"top_k": 0}, "top_k is 0"),
        (torch.ones(2, 100), {"top_k": 65}, "1 ... 64"),
        (torch.ones(2, 8), {"temperature": 0.0}, "temperature is 0.0, wanted above 0"),
        (torch.ones(2, 8), {"temperature": float("nan")}, "temperature is nan"),
        (torch.ones(8), {}, r"wanted \[B, V\]"),
        (torch.ones(0, 8), {}, "empty"),
        (torch.ones(2, 8).long(), {}, "int64"),
        (torch.ones(8, 2).T, {}, "2 apart"),
        (torch.ones(2, 8), {"uniform": torch.ones(3)}, r"uniform is \[3\]"),
        (torch.ones(2, 8), {"uniform": torch.ones(2).double()}, "uniform float64"),
        (torch.ones(2, 8), {"uniform": torch.ones(2)}, r"uniform has values 1.0 ... 1.0, wanted 0 ... less than 1"),
        (torch.ones(2, 8), {"uniform": torch.tensor([0.5, -0.25])}, r"uniform has values -0.25 ... 0.5, wanted 0 ..."),
        (torch.ones(2, 8), {"uniform": torch.tensor([0.5, float("nan")])}, "uniform has values nan ... nan"),
    ],
)
def test_what_it_does_not_take(logits: torch.Tensor, options: dict[str, object], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        launch(logits, **options)
