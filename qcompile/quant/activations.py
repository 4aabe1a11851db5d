"""Int8 activations, as a target computes them: to measure what they cost, not to run a model.

per token    scale_t = max_k |x_tk| / 127                 x' = scale_t * round(x / scale_t)
per tensor   scale = limit / 127, zero_point = 0          x' = scale * clip(round(x / scale), -128, 127)
unit norm    scale = 4 / 127                              the same: x has mean square 1 and is nearly normal
"""

from __future__ import annotations

import numpy as np

from qcompile.errors import QuantError
from qcompile.quant.scheme import FloatArray, InputStatistics

INT8_MAX = np.float32(127)
# Of a row with mean square 1 whose elements are nearly normal: 6e-5 of them lie beyond 4 and are clipped. On a real 0.5B
# model 3.5 loses as much, 4.5 and 5 lose more (docs/quantization_graph.md).
UNIT_NORM_STEP = float(np.float32(4) / INT8_MAX)


def round_per_token(x: FloatArray) -> FloatArray:
    """Return x [T, K] rounded to int8 with one scale per token, in float32."""
    scales = np.abs(x).max(axis=1, keepdims=True) / INT8_MAX
    scales = np.where(scales < np.finfo(np.float32).tiny, np.float32(1), scales)
    return np.asarray(np.rint(x / scales) * scales)


def round_per_tensor(x: FloatArray, scale: float) -> FloatArray:
    """Return x [T, K] rounded to int8 with one scale for all."""
    return np.asarray(np.clip(np.rint(x / np.float32(scale)), -128, 127) * np.float32(scale))


def search_static_scale(statistics: InputStatistics, num_steps: int = 60, smallest_ratio: float = 0.02) -> float:
    """Return the per-tensor scale that rounds the calibration's tokens with the least squared error.

    The grid is geometric: an outlier of one token may be a hundred times what the others need.

    Raises:
        QuantError: No sample of the inputs was gathered.
    """
    if statistics.sample is None or len(statistics.sample) == 0:
        raise QuantError("a static activation scale needs a sample of the inputs; run a calibration that gathers one")
    covering = float(statistics.abs_max.max()) / float(INT8_MAX)
    if covering < np.finfo(np.float32).tiny:
        return 1.0
    tries = [covering * float(ratio) for ratio in np.geomspace(1.0, smallest_ratio, num_steps)]
    errors = [float(((round_per_tensor(statistics.sample, s) - statistics.sample) ** 2).sum()) for s in tries]
    return tries[int(np.argmin(errors))]
