"""Intervals and pass@k against numbers worked out by other means."""

from itertools import combinations
from math import isclose

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.evaluate.statistics import pass_at_k, pass_at_k_with_greedy, quantile, share_of, spread_of, wilson

DRAWS = st.lists(st.booleans(), min_size=1, max_size=7)


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (167, 200, 0.7773, 0.8800),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, without continuity correction
        (15, 148, 0.0624, 0.1605),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson(successes: int, total: int, low: float, high: float) -> None:
    assert wilson(successes, total) == pytest.approx((low, high), abs=6e-5)


@given(st.integers(0, 400), st.integers(1, 400))
def test_the_interval_holds_the_share(successes: int, total: int) -> None:
    successes = min(successes, total)
    low, high = wilson(successes, total)
    assert 0 <= low <= successes / total + 1e-12
    assert successes / total - 1e-12 <= high <= 1
    assert isclose(low, 1 - wilson(total - successes, total)[1], abs_tol=1e-12)


def test_nothing_counted() -> None:
    assert wilson(0, 0) == (0, 1)
    assert share_of(0, 0) == {"count": 0, "total": 0, "share": None, "interval_95": None}


@given(DRAWS, st.data())
def test_pass_at_k_is_the_mean_over_all_choices_of_k(draws: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(draws)))
    chosen = [any(subset) for subset in combinations(draws, k)]
    assert isclose(pass_at_k(len(draws), sum(draws), k), sum(chosen) / len(chosen), abs_tol=1e-12)


@given(st.booleans(), DRAWS, st.data())
def test_with_a_greedy_text_it_is_always_in_the_set(greedy: bool, draws: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(draws) + 1))
    chosen = [greedy or any(subset) for subset in combinations(draws, k - 1)]
    estimate = pass_at_k_with_greedy(greedy, len(draws), sum(draws), k)
    assert isclose(estimate, sum(chosen) / len(chosen), abs_tol=1e-12)


def test_known_values() -> None:
    assert pass_at_k(200, 100, 1) == 0.5
    assert pass_at_k(5, 1, 3) == pytest.approx(0.6)
    assert pass_at_k(3, 0, 3) == 0
    assert pass_at_k(3, 1, 3) == 1
    assert pass_at_k_with_greedy(False, 4, 1, 3) == pytest.approx(0.5)


@pytest.mark.parametrize(("n", "c", "k"), [(3, 4, 1), (3, -1, 1), (3, 1, 4), (3, 1, 0)])
def test_what_cannot_be(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(n, c, k)


def test_quantiles() -> None:
    assert quantile([], 0.5) == 0
    assert quantile([3, 1, 2], 0.5) == 2
    assert quantile([1, 2, 3, 4], 0.5) == 2.5
    assert quantile([*range(101)], 0.95) == 95
    assert spread_of([1, 2, 6]) == {"mean": 3, "median": 2, "p95": pytest.approx(5.6), "max": 6}
    assert spread_of([]) == {"mean": 0, "median": 0, "p95": 0, "max": 0}
