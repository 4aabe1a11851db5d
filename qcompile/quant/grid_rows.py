"""The stored form of rows that lie on a grid: codes, scales, offsets, and what types hold them exactly.

    w = scales * codes + offsets      codes signed; offsets = half the code range * scales - minima

Scales and minima are products of int8 codes and a half-precision step of 256 numbers where they can be, else half precision
where that holds them, else float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from qcompile.quant.grid import Floats, Kind, fit_blocks, in_half
from qcompile.quant.grid_nested import NESTED, shared_offsets, shared_steps

KINDS = (
    Kind(32),
    Kind(16, is_nested=True),
    Kind(32, is_affine=True, is_nested=True),
    Kind(16, is_affine=True, is_nested=True),
)
_BITS = (4, 5, 6, 8)
CHUNK = 16  # rows that are stored alike, at least


class Storage(IntEnum):
    """What holds the numbers of blocks exactly."""

    CODES = 0
    HALF = 1
    SINGLE = 2

    @classmethod
    def of_all(cls, storages: Iterable[int]) -> Storage:
        """Return what holds all of some numbers: half precision does not hold products of codes and steps."""
        kinds = set(storages)
        return cls(kinds.pop()) if len(kinds) == 1 else cls.SINGLE


@dataclass(frozen=True)
class Grid:
    """How rows are stored.

    Attributes:
        kind: Their blocks.
        bits: 4, 5, 6 or 8.
        scales: What holds the scales.
        minima: What holds the minima of an affine grid.
    """

    kind: Kind
    bits: int
    scales: Storage
    minima: Storage = Storage.CODES

    def storage(self) -> dict[str, str]:
        """Return what holds scales and minima, in words."""
        words = {"scales": self.scales.name.lower()}
        return {**words, "minima": self.minima.name.lower()} if self.kind.is_affine else words

    def joined(self, other: Grid) -> Grid:
        """Return the grid that holds the rows of both, of one kind."""
        return replace(
            self,
            bits=max(self.bits, other.bits),
            scales=Storage.of_all((self.scales, other.scales)),
            minima=Storage.of_all((self.minima, other.minima)),
        )


@dataclass
class NestedNumbers:
    """Numbers [N, G] of blocks, and codes times shared steps where they are such products.

    Attributes:
        values: float32 [N, G].
        codes: int8 [N, G].
        steps: float32 [N, G / count], half-precision numbers.
        storage: [N], what holds the numbers of a row.
    """

    values: Floats
    codes: npt.NDArray[np.int8]
    steps: Floats
    storage: npt.NDArray[np.int64]


@dataclass
class GridRows:
    """Rows on a grid of one kind.

    Attributes:
        codes: int8 [N, M], signed.
        bits: int [N] that the codes of a row take; 0 where it is not on such a grid.
        scales: Of the blocks.
        minima: Of an affine grid: offsets = half the code range * scales - minima.
    """

    codes: npt.NDArray[np.int8]
    bits: npt.NDArray[np.int64]
    scales: NestedNumbers
    minima: NestedNumbers | None


def rows_on_grid(rows: Floats, kind: Kind, bits: int | None = None) -> GridRows:
    """Return rows as codes.

    Args:
        rows: float32 [N, M], finite; M is a multiple of the block.
        kind: What to look for.
        bits: Of the codes, where they are known: 4 and 5 for an affine grid. By default as few as each `CHUNK` rows need.
    """
    num_rows, width = rows.shape
    fit = fit_blocks(rows.reshape(-1, kind.block), kind)
    shape = (num_rows, width // kind.block)
    count = NESTED // kind.block
    is_nested = kind.is_nested and width % NESTED == 0
    steps, codes = fit.steps.reshape(shape), fit.codes
    is_on = fit.fits.reshape(shape).all(axis=1)
    most = np.abs(codes).max(axis=1).reshape(shape)
    limits = _limits(most.max(axis=1), bits, is_affine=kind.is_affine)
    if is_nested:
        scales, factors = _nested_scales(steps, most, limits, count)
        codes = codes * factors.reshape(-1, 1)
    else:
        scales = _plain(steps)
    minima = None
    if kind.is_affine:
        assert fit.lowest is not None
        sizes = np.abs(rows).reshape(-1, kind.block).max(axis=1).reshape(shape)
        spare = limits[:, None] - codes.max(axis=1).reshape(shape)
        first, minima = _minima(fit.lowest.reshape(shape), scales.values, spare, sizes, count if is_nested else 0)
        codes = codes + first.reshape(-1, 1) - np.repeat((limits + 1) // 2, shape[1])[:, None]
    whole = codes.reshape(num_rows, width)
    return GridRows(whole.astype(np.int8), np.where(is_on, _bits(whole), 0), scales, minima)


def _limits(most: npt.NDArray[np.integer], bits: int | None, *, is_affine: bool) -> npt.NDArray[np.int64]:
    """Return the largest magnitude of a code [N]: of symmetric rows 8, 16, 32 or 128, of affine ones 15 or 31."""
    if bits is not None:
        return np.full(len(most), (1 << bits) - 1 if is_affine else 1 << (bits - 1))
    starts = np.arange(0, len(most), CHUNK)
    most = np.repeat(np.maximum.reduceat(most, starts), CHUNK)[: len(most)]
    ends = np.array([15, 31] if is_affine else [8, 16, 32, 128])
    return ends[np.minimum(np.searchsorted(ends, most), len(ends) - 1)]


def _nested_scales(
    steps: Floats, most: npt.NDArray[np.integer], limits: npt.NDArray[np.integer], count: int
) -> tuple[NestedNumbers, npt.NDArray[np.int16]]:
    codes, shared, factors, fits = shared_steps(steps, most, limits, count)
    spread = np.repeat(fits, count, axis=1)
    factors = np.where(spread, factors, np.int16(1))
    values = np.where(spread, codes * np.repeat(shared, count, axis=1), steps)
    storage = np.where(fits.all(axis=1), Storage.CODES, _plain(values).storage)
    return NestedNumbers(values.astype(np.float32), codes.astype(np.int8), shared, storage), factors


def _plain(values: Floats) -> NestedNumbers:
    exact = in_half(values)
    is_half = np.asarray((exact > -np.inf).all(axis=1))
    values = np.where(is_half[:, None], exact, values).astype(np.float32)
    none = np.zeros((len(values), 0))
    return NestedNumbers(values, none.astype(np.int8), none, np.where(is_half, Storage.HALF, Storage.SINGLE))


def _minima(
    lowest: Floats, steps: Floats, spare: npt.NDArray[np.integer], sizes: Floats, count: int
) -> tuple[npt.NDArray[np.int16], NestedNumbers]:
    """Return the smallest code that each block uses, and the minima [N, G] with lowest = steps * smallest - minima."""
    middle = (spare // 2).astype(np.int16)
    if not count:
        return middle, _plain(steps * middle - lowest)
    used, codes, shared, fits = shared_offsets(lowest, steps, spare, sizes, count)
    spread = np.repeat(fits, count, axis=1)
    used = np.where(spread, used, middle)
    values = np.where(spread, codes * np.repeat(shared, count, axis=1), steps * used - lowest)
    storage = np.where(fits.all(axis=1), Storage.CODES, _plain(values).storage)
    return used, NestedNumbers(values.astype(np.float32), codes.astype(np.int8), shared, storage)


def _bits(codes: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """Return how many bits the signed codes [N, M] of a row take."""
    most = np.maximum(codes.max(axis=1), -1 - codes.min(axis=1))
    return np.asarray(np.array(_BITS)[np.searchsorted([1 << (bits - 1) for bits in _BITS[:-1]], most, side="right")])
