"""Shares with their uncertainty, pass@k, and order statistics."""

import math
from collections.abc import Sequence
from typing import Any

_Z95 = 1.959963984540054


def wilson(successes: float, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927); (0, 1) when nothing was counted."""
    if total == 0:
        return 0.0, 1.0
    share = successes / total
    middle = share + _Z95**2 / (2 * total)
    spread = _Z95 * math.sqrt(share * (1 - share) / total + _Z95**2 / (4 * total * total))
    scale = 1 + _Z95**2 / total
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def share_of(successes: float, total: int) -> dict[str, Any]:
    """A share as it stands in the scoreboard: counts, value and 95 % interval."""
    low, high = wilson(successes, total)
    return {
        "count": successes,
        "total": total,
        "share": round(successes / total, 6) if total else None,
        "interval_95": [round(low, 6), round(high, 6)] if total else None,
    }


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The unbiased estimate of pass@k from n drawn samples, c of them right: 1 - C(n-c, k) / C(n, k).

    Chen et al. 2021, "Evaluating Large Language Models Trained on Code", eq. 1.
    """
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} samples, {num_correct} right")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def pass_at_k_with_greedy(is_greedy_correct: bool, num_drawn: int, num_drawn_correct: int, k: int) -> float:
    """The unbiased estimate of pass@k for "the greedy text and k - 1 drawn ones".

    The greedy text is no draw, so it is always in the set, and Chen's estimate holds for the others:
    1 - [greedy wrong] * C(m-c, k-1) / C(m, k-1) with m drawn texts, c of them right.
    """
    if is_greedy_correct or k == 1:
        return float(is_greedy_correct)
    return pass_at_k(num_drawn, num_drawn_correct, k - 1)


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile, interpolated between neighbours; 0 of nothing."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread_of(values: Sequence[float], digits: int = 6) -> dict[str, float]:
    """Mean, median, 95 % quantile and maximum."""
    mean = sum(values) / len(values) if values else 0.0
    numbers = {
        "mean": mean,
        "median": quantile(values, 0.5),
        "p95": quantile(values, 0.95),
        "max": max(values, default=0),
    }
    return {name: round(value, digits) for name, value in numbers.items()}
