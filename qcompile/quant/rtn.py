"""Symmetric round-to-nearest int8, one scale per block of a row.

    scale = max|w| / 127,   q = round(w / scale),   w' = q * scale        (Jacob et al. 2018, eq. 1 with zero point 0)

so |w - w'| <= scale / 2. A block of zeros, or of numbers too small for a normal scale, gets scale 1 and q 0: a scale of
0 would divide to NaN.
"""

from __future__ import annotations

import numpy as np

from qcompile.errors import QuantError

INT8_MAX = 127
_TINY = float(np.finfo(np.float32).tiny)


def block_scales(weight: np.ndarray, block_size: int, smallest: float = _TINY) -> np.ndarray:
    """Return the scale of every block.

    Args:
        weight: Float [N, M], M divisible by `block_size`.
        block_size: Elements of a row that share a scale.
        smallest: Smallest normal number of the type that will hold the scales.

    Returns:
        float32 [N, M / block_size].

    Raises:
        QuantError: M is not divisible, or a weight is NaN or infinite.
    """
    blocks = _blocks(weight, block_size)
    largest = np.abs(blocks).max(axis=2).astype(np.float32)
    if not np.isfinite(largest).all():
        row = int(np.argwhere(~np.isfinite(largest))[0, 0])
        raise QuantError(f"row {row} has NaN or infinite weights; they cannot be quantized")
    scales = largest / np.float32(INT8_MAX)
    return np.asarray(np.where(scales < smallest, np.float32(1), scales), dtype=np.float32)


def quantize_blocks(weight: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return int8 [N, M] for float weight [N, M] and scales [N, M / block_size]."""
    block_size = weight.shape[1] // scales.shape[1]
    scaled = _blocks(weight, block_size).astype(np.float32) / scales[:, :, None]
    return np.asarray(np.clip(np.rint(scaled), -INT8_MAX, INT8_MAX), dtype=np.int8).reshape(weight.shape)


def dequantize_blocks(quantized: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return float32 [N, M]: q * scale."""
    rows, columns = quantized.shape
    blocks = quantized.reshape(rows, scales.shape[1], -1).astype(np.float32)
    return np.asarray(blocks * scales[:, :, None], dtype=np.float32).reshape(rows, columns)


def _blocks(weight: np.ndarray, block_size: int) -> np.ndarray:
    if weight.ndim != 2 or block_size <= 0 or weight.shape[1] % block_size:
        raise QuantError(f"a weight of shape {list(weight.shape)} has no blocks of {block_size} along its rows")
    return weight.reshape(weight.shape[0], -1, block_size)
