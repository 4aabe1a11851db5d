"""Sampling: limits of the options, the distributions they leave, repeatability."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.runtime.errors import RequestError
from qcompile.runtime.sampling import Sampler, SamplingParams, choose_tokens
from qcompile.runtime.session import Scores

BAD = [
    ("max_new_tokens", 0),
    ("max_new_tokens", 2.5),
    ("max_new_tokens", True),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", "hot"),
    ("top_k", -2),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("min_p", -0.1),
    ("min_p", 1.5),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", None),
    ("seed", -1),
    ("seed", 1.0),
    ("stop", ("a", "")),
    ("stop", (1,)),
    ("stop_token_ids", (-1,)),
    ("stop_token_ids", ("a",)),
    ("logprobs", -1),
    ("logprobs", 101),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_values_out_of_range(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"^{name}: .* wanted, got "):
        SamplingParams(**{name: value})


def test_one_stop_string_is_a_list_of_one() -> None:
    assert SamplingParams(stop="</answer>").stop == ("</answer>",)


def test_generation_config_fills_what_is_not_given() -> None:
    config = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "eos_token_id": 3}
    params = SamplingParams.from_generation_config(config, top_k=5, max_new_tokens=9)
    assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (0.7, 0.8, 5, 1.05)
    assert params.max_new_tokens == 9
    assert SamplingParams.from_generation_config({}).temperature == 1.0
    with pytest.raises(RequestError, match=r"^m/generation_config\.json: temperature: .*; give a value of your own"):
        SamplingParams.from_generation_config({"temperature": "warm"}, "m/generation_config.json")
    assert SamplingParams.from_generation_config({"temperature": "warm"}, temperature=0.5).temperature == 0.5
    with pytest.raises(RequestError, match=r"^top_k: "):
        SamplingParams.from_generation_config({"top_k": 3}, top_k=[3])


def test_with_options() -> None:
    params = SamplingParams(top_k=3).with_options(seed=5)
    assert (params.top_k, params.seed) == (3, 5)
    with pytest.raises(RequestError, match="unknown sampling option 'topk'; there are: max_new_tokens"):
        params.with_options(topk=1)


def draw(row: np.ndarray, count: int = 4000, **options: object) -> Counter[int]:
    sampler = Sampler(SamplingParams(seed=3, **{"temperature": 1.0, **options}), [])
    return Counter(sampler.choose(row).token_id for _ in range(count))


def test_frequencies_follow_the_softmax() -> None:
    row = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    seen = draw(row, 20000)
    np.testing.assert_allclose([seen[i] / 20000 for i in range(4)], [0.5, 0.3, 0.15, 0.05], atol=0.015)


def test_temperature() -> None:
    row = np.log(np.array([0.8, 0.2], np.float32))
    seen = draw(row, 20000, temperature=2.0)
    odds = math.sqrt(0.8) / (math.sqrt(0.8) + math.sqrt(0.2))
    assert abs(seen[0] / 20000 - odds) < 0.015
    assert draw(row, 200, temperature=1e-6) == {0: 200}


def test_top_k_keeps_equals() -> None:
    row = np.array([1.0, 3.0, 2.0, 2.0, 0.0], np.float32)
    assert set(draw(row, top_k=1)) == {1}
    assert set(draw(row, top_k=2)) == {1, 2, 3}
    assert set(draw(row, top_k=99)) == {0, 1, 2, 3, 4}


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    row = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))
    assert set(draw(row, top_p=0.4)) == {1}
    assert set(draw(row, top_p=0.65)) == {1, 3}
    assert set(draw(row, top_p=0.75)) == {1, 3, 2}
    assert set(draw(row, top_p=1e-6)) == {1}


def test_min_p() -> None:
    row = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    assert set(draw(row, min_p=0.5)) == {0, 1}
    assert set(draw(row, min_p=1.0)) == {0}


def test_repetition_penalty_as_hugging_face() -> None:
    row = np.array([2.0, -1.0, 1.9, -0.5], np.float32)
    sampler = Sampler(SamplingParams(repetition_penalty=1.5), [0, 1, 7])
    assert sampler.choose(row).token_id == 2
    assert sampler.choose(row).token_id == 0  # 2 has been generated: 1.9 / 1.5 < 2 / 1.5
    assert row[0] == 2.0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 1.0), st.floats(0.1, 3.0), st.integers(0, 60), st.floats(0, 1))
def test_what_can_be_drawn_is_what_a_plain_reference_allows(
    seed: int, top_p: float, temperature: float, top_k: int, min_p: float
) -> None:
    rng = np.random.default_rng(seed)
    row = (rng.standard_normal(50) * 4).astype(np.float32)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    sampler = Sampler(params, [])
    allowed = reference_support(row, params)
    assert {sampler.choose(row).token_id for _ in range(60)} <= allowed


def reference_support(row: np.ndarray, params: SamplingParams) -> set[int]:
    """Every id that Hugging Face's warpers, in their order, leave a finite score."""
    order = np.argsort(-row, kind="stable")
    if params.top_k:
        order = order[: params.top_k]
    weights = np.exp((row[order].astype(np.float64) - row.max()) / params.temperature)
    probabilities = weights / weights.sum()
    kept = [0] + [i for i in range(1, len(order)) if probabilities[:i].sum() < params.top_p + 1e-9]
    order, probabilities = order[kept], probabilities[kept]
    return set(order[probabilities >= params.min_p * probabilities[0] * (1 - 1e-9)].tolist())


def test_the_seed_repeats_and_its_absence_does_not() -> None:
    row = np.zeros(1000, np.float32)
    runs = [
        [sampler.choose(row).token_id for _ in range(20)]
        for sampler in (Sampler(SamplingParams(temperature=1.0, seed=s), []) for s in (1, 1, 2, None, None))
    ]
    assert runs[0] == runs[1]
    assert len({tuple(run) for run in runs}) == 4


def test_a_batch_draws_as_each_alone() -> None:
    rows = np.random.default_rng(0).standard_normal((3, 40)).astype(np.float32)
    many = [
        SamplingParams(),
        SamplingParams(temperature=1.0, seed=4),
        SamplingParams(temperature=0.5, seed=4, top_k=3, logprobs=2),
    ]
    together = choose_tokens(Scores(rows), [Sampler(params, []) for params in many])
    alone = [Sampler(params, []).choose(row) for params, row in zip(many, rows, strict=True)]
    assert together == alone


def test_logprobs_are_of_the_models_own_distribution() -> None:
    row = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32)) + 7
    sampler = Sampler(SamplingParams(temperature=0.01, repetition_penalty=2.0, seed=0, logprobs=2), [3])
    token = sampler.choose(row).logprob
    assert token is not None
    assert math.exp(token.logprob) == pytest.approx([0.5, 0.3, 0.15, 0.05][token.token_id], rel=1e-5)
    assert [token_id for token_id, _ in token.top] == [0, 1]
    assert math.exp(token.top[1][1]) == pytest.approx(0.3, rel=1e-5)


def test_candidates_chosen_by_the_graph() -> None:
    scores = Scores(np.array([[0.1, 5.0], [3.0, 1.0]], np.float32), np.array([[90, 70], [11, 12]]))
    greedy = [Sampler(SamplingParams(), []) for _ in range(2)]
    assert [choice.token_id for choice in choose_tokens(scores, greedy)] == [70, 11]
    sampled = [Sampler(SamplingParams(temperature=1.0, top_k=1), []), Sampler(SamplingParams(logprobs=1), [])]
    choices = choose_tokens(scores, sampled)
    assert choices[0].token_id == 70
    assert "logprobs need the scores of all tokens, this graph returns its best 2" in str(choices[1].error)
    penalised = Sampler(SamplingParams(repetition_penalty=9.0), [70])
    assert penalised.choose(np.array([1.0, 5.0], np.float32), np.array([90, 70])).token_id == 90


def test_one_candidate_can_only_be_taken_greedily() -> None:
    scores = Scores(np.zeros((1, 1), np.float32), np.array([[5]]))
    assert choose_tokens(scores, [Sampler(SamplingParams(), [])])[0].token_id == 5
    error = choose_tokens(scores, [Sampler(SamplingParams(temperature=1.0), [])])[0].error
    assert error is not None
    assert "only the most likely token" in error


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_no_numbers_fail_only_their_row(value: float) -> None:
    rows = np.zeros((2, 8), np.float32)
    rows[1, 3] = value
    for params in (SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(logprobs=0)):
        choices = choose_tokens(Scores(rows), [Sampler(params, []) for _ in rows])
        assert choices[0].error is None
        assert choices[1].error is not None
        assert "scores are" in choices[1].error


def test_minus_infinity_is_never_drawn() -> None:
    row = np.full(8, -np.inf, np.float32)
    row[5] = 0.0
    assert set(draw(row, 50)) == {5}
