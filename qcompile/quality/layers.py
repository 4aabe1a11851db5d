"""Where two models part: the relative difference of their hidden states after every half block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Rounding alone: float32 sums taken in another order stay some 100 times below this, half precision some 5 times.
FLOAT_LIMIT = 1e-3
HALF_LIMIT = 3e-2
PARTS = ("attention", "mlp")
# Unrelated vectors of one length differ by sqrt(2) of it
_UNRELATED, _RELATED_KL = 1.0, 0.5


@dataclass(frozen=True)
class HalfBlock:
    """The residual stream behind one block.

    Attributes:
        layer: Decoder layer.
        part: ``attention`` or ``mlp``.
        mean_difference: Mean over tokens of |a - b| / |a| (Euclidean norms over the hidden size).
        max_difference: The largest of a token.
    """

    layer: int
    part: str
    mean_difference: float
    max_difference: float


@dataclass(frozen=True)
class LayerReport:
    """Every half block, and where the difference first exceeds rounding.

    Attributes:
        blocks: In the order of computation; empty when they could not be looked at.
        reason: Why they could not.
        limit: The relative difference of a token that counts as diverging.
    """

    blocks: tuple[HalfBlock, ...]
    reason: str
    limit: float

    @property
    def first_divergence(self) -> HalfBlock | None:
        """The first half block in which some token differs by more than the limit."""
        return next((b for b in self.blocks if not b.max_difference <= self.limit), None)

    @property
    def largest_step(self) -> HalfBlock | None:
        """The half block that adds most to the mean difference."""
        before = (0.0, *(b.mean_difference for b in self.blocks))
        steps = [b.mean_difference - a for a, b in zip(before, self.blocks, strict=False)]
        return self.blocks[int(np.argmax(steps))] if steps else None


class LayerMeter:
    """Gathers the differences token by token; memory does not grow with the text.

    Args:
        num_values: Half blocks: 2 x layers, or 0 when the streams are not known.
    """

    def __init__(self, num_values: int) -> None:
        self._sums = np.zeros(num_values)
        self._largest = np.zeros(num_values)
        self._count = 0

    def add(
        self, reference: Sequence[npt.NDArray[np.float32]], other: Sequence[npt.NDArray[np.float32]], first: int
    ) -> None:
        """Take in one chunk: a [S, D] per half block and model; rows before `first` are context only."""
        if not len(self._sums) or first >= len(reference[0]):
            return
        for i, (a, b) in enumerate(zip(reference, other, strict=True)):
            difference = relative_differences(a[first:], b[first:])
            self._sums[i] += difference.sum()
            self._largest[i] = max(self._largest[i], float(difference.max()))
        self._count += len(reference[0]) - first

    def report(self, reason: str, *, is_half: bool, mean_kl: float) -> LayerReport:
        """Return what was gathered.

        Models that say the same things out of hidden states that have nothing in common carry them in different bases.
        """
        blocks = tuple(
            HalfBlock(i // 2, PARTS[i % 2], float(self._sums[i] / max(self._count, 1)), float(self._largest[i]))
            for i in range(len(self._sums))
        )
        limit = HALF_LIMIT if is_half else FLOAT_LIMIT
        if blocks and blocks[0].mean_difference > _UNRELATED and mean_kl < _RELATED_KL:
            return LayerReport((), "the two carry their hidden states in different bases", limit)
        return LayerReport(blocks, reason, limit)


def relative_differences(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Return |a - b| / |a| of every row of [S, D]; 0 / 0 is 0, anything over 0 is infinite."""
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    size = np.sqrt(np.square(wide_a).sum(axis=1))
    distance = np.sqrt(np.square(wide_a - wide_b).sum(axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = distance / size
    return np.asarray(np.where(distance == 0, 0.0, ratio))
