"""Sums of x x^T, by the panels above the diagonal: a symmetric matrix in half the work and half the bytes.

A panel is [r : r + 256, r :]. Of the multiply-adds T K^2 of a product, K inputs and T tokens, the panels take one half and
128 / K more.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qcompile.quant.scheme import FloatArray

_PANEL = 256


def add_moments(matrix: FloatArray, tokens: FloatArray) -> None:
    """Add x^T x of tokens [T, K] to the panels of a matrix [K, K]; what is below them stays as it is."""
    for start, panel in _panels(matrix):
        panel += tokens[:, start : start + _PANEL].T @ tokens[:, start:]


def mirror(matrix: FloatArray) -> FloatArray:
    """Fill in a matrix [K, K] below its panels, and return it."""
    for start, panel in _panels(matrix):
        matrix[start + _PANEL :, start : start + _PANEL] = panel[:, _PANEL:].T
    return matrix


def pack_symmetric(matrix: FloatArray) -> FloatArray:
    """Return the panels of a symmetric matrix [K, K], one after the other."""
    return np.concatenate([panel.reshape(-1) for _, panel in _panels(matrix)])


def unpack_symmetric(packed: FloatArray, size: int) -> FloatArray:
    """Return the matrix [K, K] of its panels.

    Raises:
        ValueError: The panels are not those of such a matrix.
    """
    matrix = np.empty((size, size), dtype=np.float32)
    used = 0
    for _, panel in _panels(matrix):
        values = packed[used : used + panel.size]
        if len(values) != panel.size:
            raise ValueError(f"{len(packed)} numbers for a matrix of {size}")
        panel[...] = values.reshape(panel.shape)
        used += panel.size
    return mirror(matrix)


def packed_bytes(size: int) -> int:
    """Return the bytes that `pack_symmetric` makes of a matrix [K, K]."""
    return sum(4 * (min(start + _PANEL, size) - start) * (size - start) for start in range(0, size, _PANEL))


def _panels(matrix: FloatArray) -> Iterator[tuple[int, FloatArray]]:
    for start in range(0, len(matrix), _PANEL):
        yield start, matrix[start : start + _PANEL, start:]
