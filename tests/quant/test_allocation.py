import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import QuantError
from qcompile.quant.allocation import Allocation, Choice, fit_divergence, fit_size, reach_quality

CHOICE = st.builds(Choice, st.just("x"), st.integers(1, 10_000), st.floats(0, 1))
CHOICES = st.lists(st.lists(CHOICE, min_size=1, max_size=3), min_size=1, max_size=5).map(
    lambda tensors: {f"t{i}": own for i, own in enumerate(tensors)}
)


def every_allocation(choices):
    return [Allocation(dict(zip(choices, picked, strict=True))) for picked in itertools.product(*choices.values())]


@settings(max_examples=60, deadline=None)
@given(CHOICES, st.floats(0, 1.2))
def test_a_size_is_kept_and_nothing_better_fits_in_a_little_less(choices, share):
    everything = every_allocation(choices)
    smallest, largest = (f(a.size_bytes for a in everything) for f in (min, max))
    budget = int(smallest + share * (largest - smallest))
    found = fit_size(choices, budget)
    assert found.size_bytes <= budget
    slack = len(choices) * max(1, (budget - smallest) / 65536)
    rivals = [a.divergence for a in everything if a.size_bytes <= budget - slack]
    assert found.divergence <= min(rivals, default=float("inf")) + 1e-12


@settings(max_examples=60, deadline=None)
@given(CHOICES, st.floats(0, 1.2))
def test_a_divergence_is_kept_and_nothing_smaller_fits_in_a_little_less(choices, share):
    everything = every_allocation(choices)
    best, worst = (f(a.divergence for a in everything) for f in (min, max))
    bound = best + share * (worst - best) + 1e-9
    found = fit_divergence(choices, bound)
    assert found.divergence <= bound + 1e-12
    slack = len(choices) * (bound - best) / 65536
    rivals = [a.size_bytes for a in everything if a.divergence <= bound - slack]
    assert found.size_bytes <= min(rivals, default=10**9)


def three_tensors():
    return {
        "robust": [Choice("int4", 50, 0.001), Choice("int8", 100, 0.0001)],
        "fragile": [Choice("int4", 50, 0.1), Choice("int8", 100, 0.001)],
        "large": [Choice("int4", 500, 0.05), Choice("int8", 1000, 0.0005)],
    }


def test_the_fragile_tensor_gets_the_bytes():
    assert fit_size(three_tensors(), 660).labels() == {"robust": "int4", "fragile": "int8", "large": "int4"}
    assert fit_divergence(three_tensors(), 0.053).labels() == {"robust": "int4", "fragile": "int8", "large": "int4"}
    assert fit_size(three_tensors(), 600).size_bytes == 600
    assert fit_size(three_tensors(), 10**9).labels() == dict.fromkeys(three_tensors(), "int8")


def test_what_cannot_be_reached_says_the_best_found():
    with pytest.raises(
        QuantError, match=r"size of 0.000599 MB cannot be reached: the smallest found is 0.001 MB, at a KL .*0.15"
    ):
        fit_size(three_tensors(), 599)
    with pytest.raises(QuantError, match=r"KL of 1e-09 cannot be reached .*: the best found is about 0.0016"):
        fit_divergence(three_tensors(), 1e-9)


def test_messages_count_what_is_stored_besides_the_tensors():
    with pytest.raises(QuantError, match=r"size of 1e-05 MB cannot be reached: the smallest found is 5.001 MB,"):
        fit_size(three_tensors(), 10 - 5_000_000, other_bytes=5_000_000)
    with pytest.raises(QuantError, match=r"best found is 0.016, at 5.002 MB"):
        reach_quality(three_tensors(), 0.01, lambda a: 10 * a.divergence, other_bytes=5_000_000)


@pytest.mark.parametrize("factor", [0.3, 1.0, 2.5])
def test_the_target_is_met_by_what_is_measured_and_not_by_the_sum(factor):
    calls = []
    tensors = {f"t{i}": [Choice("int4", 50, 0.01 * (i + 1)), Choice("int8", 100, 1e-5 * (i + 1))] for i in range(20)}

    def measure(allocation):
        calls.append(allocation)
        return factor * allocation.divergence

    found = reach_quality(tensors, 0.5, measure)
    assert found.measured <= 0.5
    assert found.measured == pytest.approx(factor * found.divergence)
    assert len(calls) <= 6
    best = fit_divergence(tensors, 0.5 / factor)
    assert found.size_bytes <= best.size_bytes * 1.02


def test_a_measured_quality_that_is_out_of_reach_says_the_best_found():
    with pytest.raises(QuantError, match=r"KL of 0.01 cannot be reached .* best found is 0.016, at 0.002 MB"):
        reach_quality(three_tensors(), 0.01, lambda a: 10 * a.divergence)
    exact = {"t": [Choice("int8", 100, 0.0)]}
    assert reach_quality(exact, 0.01, lambda a: 0.0).measured == 0.0


def test_the_record_is_json_ready():
    record = reach_quality(three_tensors(), 0.06, lambda a: a.divergence).record()
    assert record["chosen"]["fragile"] == "int8"
    assert record["measured_kl"] == pytest.approx(record["estimated_kl"])
