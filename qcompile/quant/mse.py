"""Scales searched for the smallest error, not for the widest value.

    scale* = argmin over r in [smallest_ratio, 1] of  sum_k h_k |w_k - w'_k(r * scale)|^p

with scale the one of round-to-nearest, p = 2 and h_k = 1 (OCTAV, Sakr et al. 2022, eq. 2, by a grid instead of Newton's
method; GPTQ's own quantizer searches the same grid with p = 2.4). A symmetric group may take a negative scale: the codes
[-8, 7] reach one step further on one side, and the sign chooses which (llama.cpp's Q4_0 stores such scales too). An
asymmetric group keeps its zero point: trying those beside it gains 0.1 to 0.4 % for three times the work. At p = 2 the best
of the grid is then refined by least squares on its own codes,

    scale = sum_k h_k w_k q_k / sum_k h_k q_k^2,

which can only lower the error (Lloyd 1982; QQQ and llama.cpp's k-quants do the same).

The work is one pass per candidate over blocks of rows that fit the caches, on as many threads as there are cores; the
memory beyond the result is a few blocks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from qcompile.quant.rtn import GroupScales, covering_scales, encode, grouped, nearest_codes
from qcompile.quant.scheme import AlgorithmOptions, FloatArray, QuantizedWeight, WeightScheme

_BLOCK_ELEMENTS = 1 << 18
_REFINEMENTS = 2


def search_scales(
    weight: FloatArray, scheme: WeightScheme, options: AlgorithmOptions, importance: FloatArray | None = None
) -> GroupScales:
    """Return the scales [N, G] and zero points of least error of a checked weight [N, K].

    Args:
        weight: float32 [N, K].
        scheme: Bits, groups, symmetry.
        options: Steps of the search.
        importance: float32 [K], how much an error at each input counts; None for all alike.
    """
    rows, num_inputs = weight.shape
    factors = None if importance is None else grouped(importance[None, :].astype(np.float32), scheme)[0]
    step = max(1, _BLOCK_ELEMENTS // num_inputs)

    def block(start: int) -> GroupScales:
        return _Search(grouped(weight[start : start + step], scheme), scheme, options, factors).best()

    starts = range(0, rows, step)
    if len(starts) == 1:
        return block(0)
    with ThreadPoolExecutor(num_threads()) as pool:
        parts = list(pool.map(block, starts))
    scales = np.concatenate([scale for scale, _ in parts])
    return scales, None if scheme.symmetric else np.concatenate([zero for _, zero in parts if zero is not None])


def round_with_searched_scales(
    weight: FloatArray, scheme: WeightScheme, options: AlgorithmOptions, importance: FloatArray | None = None
) -> QuantizedWeight:
    """Quantize a checked weight [N, K] with the scales of least error."""
    scales, zero_points = search_scales(weight, scheme, options, importance)
    return encode(grouped(weight, scheme), scales, zero_points, scheme, weight.shape[1])


def num_threads() -> int:
    """Return the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Candidate:
    """One try for every group: scales [N, G], zero points [N, G] or None."""

    scales: FloatArray
    zero_points: npt.NDArray[np.uint8] | None


def candidates(groups: FloatArray, scheme: WeightScheme, options: AlgorithmOptions) -> Iterator[Candidate]:
    """Yield the grid of scales for groups [N, G, g]; the first one is plain round-to-nearest."""
    covering, zero_points = covering_scales(groups, scheme)
    yield Candidate(covering, zero_points)
    ratios = np.linspace(1.0, options.smallest_ratio, options.num_steps, dtype=np.float32)
    if scheme.symmetric:
        lowest, highest = scheme.code_range
        reach = np.float32(highest / -lowest)
        has_sign = -lowest != highest
        for ratio in ratios:
            scales = covering * ratio * reach
            yield Candidate(scheme.stored_scales(scales), None)
            if has_sign:
                yield Candidate(scheme.stored_scales(-scales), None)
        return
    for ratio in ratios[1:]:
        yield Candidate(scheme.stored_scales(covering * ratio), zero_points)


class _Search:
    """The search over one block of groups [N, G, g]."""

    def __init__(
        self, groups: FloatArray, scheme: WeightScheme, options: AlgorithmOptions, factors: FloatArray | None
    ) -> None:
        self.groups, self.scheme, self.options, self.factors = groups, scheme, options, factors

    def best(self) -> GroupScales:
        tries = candidates(self.groups, self.scheme, self.options)
        best = next(tries)
        error = self.error(best)
        for candidate in tries:
            best, error = self._better(best, error, candidate)
        if self.options.exponent == 2.0:
            for _ in range(_REFINEMENTS):
                best, error = self._better(best, error, self._refitted(best))
        return best.scales, best.zero_points

    def error(self, candidate: Candidate) -> FloatArray:
        """Return the error of every group [N, G]."""
        error = self._codes(candidate)
        error *= candidate.scales[:, :, None]
        error -= self.groups
        if self.options.exponent == 2.0:
            np.multiply(error, error, out=error)
        else:
            np.power(np.abs(error), np.float32(self.options.exponent), out=error)
        if self.factors is not None:
            error *= self.factors
        return np.asarray(error.sum(axis=2))

    def _codes(self, candidate: Candidate) -> FloatArray:
        """Return the codes less the zero point [N, G, g], as floats."""
        zero = None if candidate.zero_points is None else candidate.zero_points[:, :, None]
        codes = nearest_codes(self.groups, candidate.scales[:, :, None], zero, self.scheme)
        if zero is not None:
            codes -= zero
        return codes

    def _refitted(self, candidate: Candidate) -> Candidate:
        codes = self._codes(candidate)
        weighted = codes if self.factors is None else codes * self.factors
        top, bottom = (weighted * self.groups).sum(axis=2), (weighted * codes).sum(axis=2)
        scales = np.divide(top, bottom, out=candidate.scales.copy(), where=bottom > 0)
        return replace(candidate, scales=self.scheme.stored_scales(scales))

    def _better(self, best: Candidate, error: FloatArray, other: Candidate) -> tuple[Candidate, FloatArray]:
        other_error = self.error(other)
        is_better = other_error < error
        scales = np.where(is_better, other.scales, best.scales)
        zero_points = best.zero_points
        if zero_points is not None and other.zero_points is not None:
            zero_points = np.where(is_better, other.zero_points, zero_points)
        return Candidate(scales, zero_points), np.where(is_better, other_error, error)
