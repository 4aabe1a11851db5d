"""AWQ: enlarge the input channels that matter before rounding, and shrink what feeds them by as much.

    s* = argmin over alpha in [0, 1] of  sum over Linears of |Q(W diag(s)) diag(s)^-1 X - W X|^2
    s_k = mean|x_k|^alpha,  normalised so that sqrt(max s * min s) = 1

(Lin et al. 2023, eq. 4 and 5, and the code's normalisation.) The outputs' error is taken from the second moments of the
inputs, exactly: tr(E H E^T). alpha = 0 is plain rounding, so the result is never worse on the calibration inputs.

The scale is for all Linears that read the same x; fold it with `qcompile.quant.folding`, then quantize the enlarged
weights with `clip` and `statistics.scaled(s)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcompile.quant.output_error import hessian_of, output_error
from qcompile.quant.rtn import round_to_nearest
from qcompile.quant.scheme import FloatArray, InputStatistics, WeightScheme, check_weight

Share = Callable[[FloatArray], FloatArray]
_SMALLEST = 1e-4
_MAX_ROWS = 512


@dataclass(frozen=True)
class ScaleChoice:
    """A scale per input channel, and what it gains on the calibration inputs.

    Attributes:
        scale: float32 [K]; all ones where nothing is better.
        alpha: The exponent chosen.
        error: Squared error of the outputs with it, as a share of the error without.
    """

    scale: FloatArray
    alpha: float
    error: float

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing to fold."""
        return bool((self.scale == 1).all())


def search_scale(
    weights: Sequence[npt.NDArray[np.floating]],
    scheme: WeightScheme,
    statistics: InputStatistics,
    *,
    num_steps: int = 20,
    share: Share | None = None,
    name: str = "weight",
) -> ScaleChoice:
    """Search the scale of the inputs that several Linears share.

    Args:
        weights: [N_i, K] of all Linears that read this x. At most 512 evenly spaced rows of each are tried.
        scheme: How they will be stored.
        statistics: With `hessian`.
        num_steps: Values of alpha between 0 and 1.
        share: Makes the scale agree where the operation before demands it (`share_over_query_heads`).
        name: What an error calls them.

    Raises:
        QuantError: A weight is not finite or the statistics do not fit.
    """
    rows = [sampled_rows(check_weight(weight, name), _MAX_ROWS) for weight in weights]
    hessian = hessian_of(statistics, rows[0].shape[1], "awq", name)
    plain = sum(_error(w, scheme, hessian, np.ones(w.shape[1], np.float32)) for w in rows)
    best = ScaleChoice(np.ones(rows[0].shape[1], np.float32), 0.0, 1.0)
    for alpha in np.linspace(0.0, 1.0, num_steps + 1)[1:]:
        scale = normalised(np.asarray(np.maximum(statistics.abs_mean, _SMALLEST) ** float(alpha), dtype=np.float32))
        scale = share(scale) if share is not None else scale
        error = sum(_error(w, scheme, hessian, scale) for w in rows)
        if error < best.error * plain:
            best = ScaleChoice(scale, float(alpha), error / plain)
    return best


def normalised(scale: FloatArray) -> FloatArray:
    """Return s / sqrt(max s * min s): as much enlarging as shrinking."""
    return np.asarray(scale / np.sqrt(scale.max() * scale.min()), dtype=np.float32)


def sampled_rows(weight: FloatArray, most: int) -> FloatArray:
    """Return at most so many rows, evenly spaced."""
    if len(weight) <= most:
        return weight
    return weight[np.linspace(0, len(weight) - 1, most).astype(np.intp)]


def _error(weight: FloatArray, scheme: WeightScheme, hessian: FloatArray, scale: FloatArray) -> float:
    restored = round_to_nearest(weight * scale, scheme).dequantize() / scale
    return output_error(restored - weight, hessian)
