"""Codes of 4 bits as they are stored: two neighbours to a byte."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def packed_pairs(codes: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Return codes [N, M] of 0 to 15 as uint8 [N, ceil(M / 2)], the first one low; a 0 stands behind an odd number."""
    even = np.pad(codes.astype(np.uint8, copy=False), ((0, 0), (0, codes.shape[1] % 2)))
    return np.asarray(even[:, ::2] | (even[:, 1::2] << np.uint8(4)))
