"""Steps and offsets that lie on grids themselves: K-quants keep a small code per block and one step for 256 numbers.

    step = code * shared           Q6_K, Q3_K: code int8, 16 blocks of 16; Q4_K, Q5_K: 0 to 63, 8 blocks of 32
    offset = code * shared         the second one of Q4_K, Q5_K: w = step * q - offset, 0 <= q < 2^bits

What a block shows need not be the step it was given. Where its codes have a common factor, a multiple of the step was found.
Where an affine block does not use code 0, its lowest value is not minus its offset: every unused code below is a possibility.
What the other blocks show decides.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qcompile.quant.grid import TOLERANCE, Floats, Mask, in_half

NESTED = 256  # numbers that share a step
_MAX_CODE, _MAX_FACTOR, _MAX_OFFSET_CODE = 127, 32, 63
# What ggml makes of the largest step first: -128 in Q6_K, 63 in Q4_K and Q5_K.
_STEP_ORDER = tuple(dict.fromkeys((128, -128, 63, *(sign * n for n in range(1, 128) for sign in (1, -1)))))


def shared_steps(
    steps: Floats, largest: npt.NDArray[np.integer], limits: npt.NDArray[np.integer], count: int
) -> tuple[npt.NDArray[np.int16], Floats, npt.NDArray[np.int16], Mask]:
    """Split steps into small codes and one half-precision step for some neighbours.

    Args:
        steps: float32 [N, G], the largest for which the codes of a block are integers.
        largest: int [N, G], the largest magnitude of those codes.
        limits: int [N], the largest magnitude that a code of the row may have.
        count: How many blocks share a step; it divides G.

    Returns:
        Codes int16 [N, G] and shared steps float32 [N, G / count]; int16 [N, G] factors, by which the codes of a block are to
        be multiplied (steps = codes * shared * factors); bool [N, G / count], where that is so.
    """
    groups, most = steps.reshape(-1, count), largest.reshape(-1, count)
    limit = np.broadcast_to(limits[:, None], steps.shape).reshape(-1, count)
    codes, factors = np.zeros(groups.shape, np.int16), np.ones(groups.shape, np.int16)
    shared, fits = np.zeros(len(groups), np.float32), (groups == 0).all(axis=1)
    # the codes of some blocks leave no room for a factor: the largest step of those is a code times the shared one
    sure = np.where(2 * most > limit, groups, 0)
    sure = np.where((sure != 0).any(axis=1, keepdims=True), sure, groups)
    extreme = sure[np.arange(len(sure)), np.abs(sure).argmax(axis=1)]
    left = np.flatnonzero(~fits)
    for n in _STEP_ORDER:
        half = in_half(extreme[left] / np.float32(-n))
        tried = np.abs(half) > 0
        at, step = left[tried], half[tried]
        whole = np.rint(groups[at] / step[:, None])
        near = (np.abs(groups[at] - whole * step[:, None]) <= 2 * TOLERANCE * np.abs(groups[at])).all(axis=1)
        near &= np.abs(whole).max(axis=1, initial=0) <= (_MAX_CODE + 1) * _MAX_FACTOR
        at, step, whole = at[near], step[near], whole[near].astype(np.int16)
        seen_codes, seen_factors, good = _with_factors(whole, most[at], limit[at])
        found = at[good]
        codes[found], factors[found], shared[found] = seen_codes[good], seen_factors[good], step[good]
        fits[found] = True
        left = left[~fits[left]]
    shape = (len(steps), steps.shape[1] // count)
    return codes.reshape(steps.shape), shared.reshape(shape), factors.reshape(steps.shape), fits.reshape(shape)


def _with_factors(
    whole: npt.NDArray[np.int16], most: npt.NDArray[np.integer], limit: npt.NDArray[np.integer]
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int16], Mask]:
    """Divide codes of steps [S, p] by factors where they are too large for int8 and the block's codes have room for it."""
    factors: npt.NDArray[np.int16] = np.ones(whole.shape, np.int16)
    for factor in (-1, *range(2, _MAX_FACTOR + 1)):  # codes reach -limit and not +limit: most blocks may change signs
        is_large = ~_are_int8(whole // factors)
        if not is_large.any():
            break
        factors[is_large & (whole % factor == 0) & (most * abs(factor) <= limit - (factor < 0))] = factor
    codes: npt.NDArray[np.int16] = (whole // factors).astype(np.int16)
    return codes, factors, np.asarray(_are_int8(codes).all(axis=1))


def _are_int8(codes: npt.NDArray[np.integer]) -> Mask:
    return np.asarray((codes >= -_MAX_CODE - 1) & (codes <= _MAX_CODE))


def shared_offsets(
    lowest: Floats, steps: Floats, unused: npt.NDArray[np.integer], sizes: Floats, count: int
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int16], Floats, Mask]:
    """Find offset = code * shared and the smallest code that each block uses, with lowest = step * used - offset.

    Args:
        lowest: float32 [N, G], the smallest value of each block.
        steps: float32 [N, G].
        unused: int [N, G], how many codes a block leaves over: `used` lies between 0 and that.
        sizes: float32 [N, G], the largest magnitude of each block, of which the error of `lowest` is a part.
        count: How many blocks share a step; it divides G.

    Returns:
        used int16 [N, G], codes int16 [N, G], shared steps float32 [N, G / count], bool [N, G / count] where there are such.
    """
    shape = (len(steps), steps.shape[1] // count)
    low, step, spare, size = (a.reshape(-1, count) for a in (lowest, steps, unused, sizes))
    allowed = 2 * TOLERANCE * size
    used, codes = np.zeros(low.shape, np.int16), np.zeros(low.shape, np.int16)
    shared, fits = np.zeros(len(low), np.float32), np.asarray((np.abs(low) <= allowed).all(axis=1))
    anchor = np.where(np.abs(low) > allowed, spare, np.iinfo(np.int16).max).argmin(axis=1)
    rows = np.arange(len(low))
    for first in range(int(spare.max(initial=0)) + 1):
        left = rows[~fits & (spare[rows, anchor] >= first)]
        offsets = step[left, anchor[left]] * first - low[left, anchor[left]]
        for n in range(1, _MAX_OFFSET_CODE + 1):
            if not len(left):
                break
            half = in_half(offsets / np.float32(n))
            tried = np.abs(half) > 0
            at, size_of_one = left[tried], half[tried]
            seen_used, seen_codes, good = _offsets_by(low[at], step[at], spare[at], allowed[at], size_of_one)
            found = at[good]
            used[found], codes[found], shared[found] = seen_used[good], seen_codes[good], size_of_one[good]
            fits[found] = True
            keep = ~fits[left]
            left, offsets = left[keep], offsets[keep]
    return used.reshape(steps.shape), codes.reshape(steps.shape), shared.reshape(shape), fits.reshape(shape)


def _offsets_by(
    low: Floats, step: Floats, spare: npt.NDArray[np.integer], allowed: Floats, shared: Floats
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int16], Mask]:
    """Return the smallest used code and the offset's code of blocks [S, p] for a shared step [S], and where all have them."""
    used, codes = np.zeros(low.shape, np.int16), np.zeros(low.shape, np.int16)
    open_ = np.ones(low.shape, np.bool_)
    for first in range(int(spare.max(initial=0)) + 1):
        offsets = step * first - low
        nearest = np.rint(offsets / shared[:, None])
        good = open_ & (first <= spare) & (np.abs(nearest) <= _MAX_CODE)
        good &= np.abs(offsets - nearest * shared[:, None]) <= allowed
        used[good], codes[good] = first, nearest[good]
        open_ &= ~good
        if not open_.any():
            break
    return used, codes, np.asarray(~open_.any(axis=1))
