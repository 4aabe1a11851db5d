"""Choose how to store each tensor: the least harm for so many bytes, or the fewest bytes for so much harm.

A multiple-choice knapsack (Kellerer, Pferschy & Pisinger 2004, chapter 11): one of the choices of every tensor, the sum of
one quantity bounded, the sum of the other minimal. Solved by dynamic programming over the bounded quantity, in 65,536
steps of what there is to distribute beyond each tensor's least; steps are rounded up, so a bound is never broken, and
what that gives away is at most one step per tensor. Harm is a KL divergence; those of single tensors are added, which is
their sum to first order when errors are small and independent. `reach_quality` corrects for the rest by measuring.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.errors import QuantError

_STEPS = 1 << 16
_ROUNDS = 5
_CLOSE = 0.9


@dataclass(frozen=True)
class Choice:
    """One way of storing one tensor.

    Attributes:
        label: What it is called.
        size_bytes: Codes, scales and zero points.
        divergence: KL that it adds, in nats per token.
    """

    label: str
    size_bytes: int
    divergence: float


@dataclass(frozen=True)
class Allocation:
    """One choice for every tensor.

    Attributes:
        chosen: Tensor to choice.
        measured: KL of all of them together, if it was measured.
    """

    chosen: Mapping[str, Choice]
    measured: float | None = None

    @property
    def size_bytes(self) -> int:
        """Of all tensors."""
        return sum(choice.size_bytes for choice in self.chosen.values())

    @property
    def divergence(self) -> float:
        """Sum of what each tensor adds by itself."""
        return sum(choice.divergence for choice in self.chosen.values())

    def labels(self) -> dict[str, str]:
        """Return the label of every tensor."""
        return {name: choice.label for name, choice in self.chosen.items()}

    def record(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {
            "size_bytes": self.size_bytes,
            "estimated_kl": self.divergence,
            "measured_kl": self.measured,
            "chosen": self.labels(),
        }


Choices = Mapping[str, Sequence[Choice]]


def fit_size(choices: Choices, max_bytes: int, other_bytes: int = 0) -> Allocation:
    """Return the allocation of least divergence within so many bytes.

    Args:
        choices: Per tensor.
        max_bytes: What the tensors may take.
        other_bytes: What is stored besides; the message counts it.

    Raises:
        QuantError: Even the smallest choices need more; the message says how much and at what divergence.
    """
    smallest = Allocation({name: min(own, key=lambda c: (c.size_bytes, c.divergence)) for name, own in choices.items()})
    if smallest.size_bytes > max_bytes:
        raise QuantError(
            f"a size of {(max_bytes + other_bytes) / 1e6:g} MB cannot be reached: the smallest found is "
            f"{_megabytes(smallest.size_bytes + other_bytes)} MB, at a KL of about {smallest.divergence:.2g}"
        )
    return _solve(choices, lambda c: c.size_bytes, lambda c: c.divergence, max_bytes)


def fit_divergence(choices: Choices, max_divergence: float) -> Allocation:
    """Return the smallest allocation whose divergences add up to no more than a bound.

    Raises:
        QuantError: Even the best choices diverge more; the message says how much and at what size.
    """
    best = Allocation({name: min(own, key=lambda c: (c.divergence, c.size_bytes)) for name, own in choices.items()})
    if best.divergence > max_divergence:
        raise _unreachable(max_divergence, best.size_bytes, best.divergence, "about ")
    return _solve(choices, lambda c: c.divergence, lambda c: c.size_bytes, max_divergence)


def reach_quality(
    choices: Choices, target: float, measure: Callable[[Allocation], float], other_bytes: int = 0
) -> Allocation:
    """Return the smallest allocation found whose measured divergence is within a target.

    What single tensors add is not quite what they add together. So the sum that may be spent is corrected by what was
    measured, until the measured divergence lies within 0.9 to 1 of the target, or for five rounds.

    Args:
        choices: Per tensor.
        target: KL in nats per token.
        measure: Runs the model with an allocation and returns its KL.
        other_bytes: What is stored besides the tensors; the message counts it.

    Raises:
        QuantError: The best choices, all together, were measured to diverge more.
    """
    best = Allocation({name: min(own, key=lambda c: (c.divergence, c.size_bytes)) for name, own in choices.items()})
    allowed = max(target, best.divergence)
    found: Allocation | None = None
    lowest, highest = best.divergence, np.inf
    for _ in range(_ROUNDS):
        tried = _solve(choices, lambda c: c.divergence, lambda c: c.size_bytes, allowed)
        kl = measure(tried)
        tried = Allocation(tried.chosen, kl)
        if kl <= target:
            if found is None or tried.size_bytes < found.size_bytes:
                found = tried
            lowest = max(lowest, allowed)
            if kl >= _CLOSE * target:
                break
        else:
            highest = min(highest, allowed)
        scaled = allowed * target / kl if kl > 0 else 4 * max(allowed, target)
        allowed = _between(lowest, highest, scaled)
        if np.isfinite(highest) and highest - lowest <= 1e-3 * highest:
            break
    if found is not None:
        return found
    kl = measure(best)
    if kl <= target:
        return Allocation(best.chosen, kl)
    raise _unreachable(target, best.size_bytes + other_bytes, kl, "")


def _between(lowest: float, highest: float, wanted: float) -> float:
    """Return a bound to try next: the corrected one if it is inside what is known, else the middle."""
    if lowest < wanted < highest:
        return wanted
    return 2 * wanted if not np.isfinite(highest) else (lowest + highest) / 2


def _unreachable(target: float, size_bytes: int, divergence: float, about: str) -> QuantError:
    return QuantError(
        f"a KL of {target:.2g} cannot be reached by these schemes: the best found is {about}{divergence:.2g}, at "
        f"{_megabytes(size_bytes)} MB; allow more, or keep some layers float"
    )


def _megabytes(size_bytes: int) -> str:
    """Return a size in MB, rounded up: who asks for what a message says must get it."""
    return f"{math.ceil(size_bytes / 1e3) / 1e3:.3f}"


def _solve(
    choices: Choices, bounded: Callable[[Choice], float], minimised: Callable[[Choice], float], bound: float
) -> Allocation:
    """Return one choice per tensor with the sum of `bounded` within the bound and the sum of `minimised` least."""
    names = list(choices)
    least = [min(bounded(c) for c in choices[name]) for name in names]
    spare = bound - sum(least)
    step = spare / _STEPS if spare > 0 else 1.0
    limit = _STEPS if spare > 0 else 0
    best: npt.NDArray[np.float64] = np.zeros(limit + 1)
    taken = np.zeros((len(names), limit + 1), dtype=np.uint8)
    for index, name in enumerate(names):
        tries = np.full((len(choices[name]), limit + 1), np.inf)
        for number, choice in enumerate(choices[name]):
            cost = int(np.ceil(min((bounded(choice) - least[index]) / step, limit + 1) - 1e-9))
            if cost <= limit:
                tries[number, cost:] = best[: limit + 1 - cost] + minimised(choice)
        taken[index] = tries.argmin(axis=0)
        best = tries.min(axis=0)
    chosen: dict[str, Choice] = {}
    left = limit
    for index in range(len(names) - 1, -1, -1):
        choice = choices[names[index]][int(taken[index, left])]
        chosen[names[index]] = choice
        left -= int(np.ceil(min((bounded(choice) - least[index]) / step, limit + 1) - 1e-9))
    return Allocation({name: chosen[name] for name in names})
