"""Find the grid that a weight was rounded to before: for every block of a row one step, and small integer codes.

    symmetric    w = step * code                  Q4_0, Q5_0, Q8_0 in blocks of 32; Q3_K, Q6_K of 16
    affine       w = step * code + lowest         Q4_1, Q5_1, Q4_K, Q5_K in blocks of 32; Q2_K of 16

The formats are those of ggml (github.com/ggml-org/llama.cpp, ggml/src/ggml-common.h: block_q4_0 ... block_q6_K; ggml-quants.c
has the arithmetic). A dequantized weight is float32: products of a half-precision step and a code are exact in it, what
takes two multiplications or a sum is rounded once or twice. So numbers count as equal within a few units in the last place.

A block whose value of largest magnitude is e has the step |e| / n for some integer n, an affine one of range r the step r / n:
n is searched for. Codes without a common factor belong to the largest step that fits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Mask = npt.NDArray[np.bool_]

# Relative; float32 keeps 2^-24, and a value and the step that it is compared with are each rounded once or twice.
TOLERANCE = 2.0**-21
# First what the formats mostly make of the value of largest magnitude (Q8_0: 127, the others a power of two); of two grids
# that fit, the one of fewer bits.
_SYMMETRIC_ORDER = tuple(dict.fromkeys((8, 16, 32, 127, *range(1, 129))))
# Where common factors are taken out afterwards, a smaller n is there with its multiples.
_NESTED_ORDER = (*range(32, 16, -1), *range(33, 129))
_AFFINE_ORDER = (*range(15, 7, -1), *range(31, 15, -1))
_NUM_POSITIVE = 128  # codes are int8
_SAMPLED = 4
_BATCH = 4096  # blocks


@dataclass(frozen=True)
class Kind:
    """What the blocks of a row look like.

    Attributes:
        block: Numbers in a block.
        is_affine: Whether code 0 stands for another value than 0.
        is_nested: Whether steps may be products of a small code and a step that 256 numbers share, as in K-quants.
    """

    block: int
    is_affine: bool = False
    is_nested: bool = False


@dataclass
class Fit:
    """Blocks [R, g] on their grids: values = steps * codes + lowest.

    Attributes:
        codes: int16 [R, g]; of an affine block from 0 on.
        steps: float32 [R]; 0 in blocks of one value.
        lowest: float32 [R], or None.
        fits: bool [R]; what the other arrays say of a block that does not fit means nothing.
    """

    codes: npt.NDArray[np.int16]
    steps: Floats
    lowest: Floats | None
    fits: Mask


def fit_blocks(values: Floats, kind: Kind) -> Fit:
    """Return the grids of blocks.

    Args:
        values: float32 [R, g], finite.
        kind: What to look for. Blocks that are not nested get a step that is a half-precision number wherever there is one.
    """
    parts = [_fit(values[at : at + _BATCH], kind) for at in range(0, len(values), _BATCH)]
    if len(parts) == 1:
        return parts[0]
    lowest = np.concatenate([part.lowest for part in parts if part.lowest is not None]) if kind.is_affine else None
    codes, steps, fits = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("codes", "steps", "fits")
    )
    return Fit(codes, steps, lowest, fits)


def _fit(values: Floats, kind: Kind) -> Fit:
    """Return the grids of a few blocks: few enough for what is computed on the way to stay in a cache."""
    low, high = values.min(axis=1), values.max(axis=1)
    size = np.maximum(high, -low)
    if kind.is_affine:
        search = _Search(values - low[:, None], high - low, TOLERANCE * size)
    else:
        search = _Search(values, np.where(high > -low, -high, -low), None)
    if kind.is_nested or kind.is_affine:
        search.run(_AFFINE_ORDER if kind.is_affine else _NESTED_ORDER, needs_half=False)
        search.take_out_common_factors()
    else:
        search.run(_SYMMETRIC_ORDER, needs_half=True)
        search.run(_SYMMETRIC_ORDER, needs_half=False)
    return Fit(search.codes, search.steps, low if kind.is_affine else None, search.fits)


class _Search:
    """Steps [R] of blocks [R, g] for which blocks / steps is nearly integer.

    Args:
        blocks: float32 [R, g].
        extremes: What step * n is to be, [R]; blocks of 0 have the step 0.
        allowed: How far the values of a block may be from codes times its step, [R]; by default what is relative to each.
    """

    def __init__(self, blocks: Floats, extremes: Floats, allowed: Floats | None) -> None:
        self.blocks, self.extremes, self.allowed = blocks, extremes, allowed
        self.steps = np.zeros(len(blocks), np.float32)
        self.codes = np.zeros(blocks.shape, np.int16)
        self.fits = extremes == 0

    def run(self, order: Iterable[int], *, needs_half: bool) -> None:
        """Try step = extreme / n for each n on what does not fit yet."""
        left = np.flatnonzero(~self.fits)
        for n in order:
            if not len(left):
                return
            steps = (self.extremes[left] / np.float32(n)).astype(np.float32)
            rows = left
            if needs_half:
                half = in_half(steps)
                is_half = half > -np.inf
                rows, steps = left[is_half], half[is_half]
            _, seen = self._codes(rows, steps, _SAMPLED)
            codes, good = self._codes(rows[seen], steps[seen])
            found = rows[seen][good]
            self.steps[found], self.codes[found], self.fits[found] = steps[seen][good], codes[good], True
            left = left[~self.fits[left]]

    def _codes(self, rows: npt.NDArray[np.integer], steps: Floats, count: int | None = None) -> tuple[Floats, Mask]:
        """Return the codes of some blocks, or of their first values, and whether all are codes times the step."""
        blocks = self.blocks[rows, :count]
        codes = np.rint(blocks / steps[:, None])
        errors = codes * steps[:, None]
        errors -= blocks
        np.abs(errors, out=errors)
        if self.allowed is None:
            np.abs(blocks, out=blocks)
            blocks *= np.float32(TOLERANCE)
            good = (errors <= blocks).all(axis=1)
        else:
            good = errors.max(axis=1, initial=0) <= self.allowed[rows]
        return codes, good & (codes.max(axis=1, initial=0) < _NUM_POSITIVE)

    def take_out_common_factors(self) -> None:
        """Make steps as large as they can be: codes of a block have no common factor then."""
        factors = np.maximum(np.gcd.reduce(self.codes, axis=1), 1)
        self.codes //= factors[:, None]
        self.steps *= factors


def in_half(numbers: Floats) -> Floats:
    """Return the half-precision numbers that float32 numbers stand for within the tolerance; NaN where there is none."""
    with np.errstate(over="ignore"):
        half = numbers.astype(np.float16).astype(np.float32)
    is_near = np.abs(half - numbers) <= TOLERANCE * np.abs(numbers)
    return np.where(is_near, half, np.float32(np.nan))
