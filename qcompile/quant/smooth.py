"""SmoothQuant: move the activations' outliers into the weights before both are rounded to int8.

    s_k = max|x_k|^alpha / max_n|w_nk|^(1 - alpha),      y = (x / s) (W diag(s))^T

(Xiao et al. 2022, eq. 3 and 4.) alpha is searched: each value is tried on a sample of real tokens, with weights and
activations both rounded, and the outputs compared with the float ones. No scale at all is tried too, so the result is
never worse on the sample. Fold the scale with `qcompile.quant.folding`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from qcompile.errors import QuantError
from qcompile.quant.activations import round_per_token
from qcompile.quant.awq import ScaleChoice, Share, normalised, sampled_rows
from qcompile.quant.rtn import round_to_nearest
from qcompile.quant.scheme import FloatArray, InputStatistics, WeightScheme, check_weight

_SMALLEST = 1e-5
_MAX_ROWS = 256
_MAX_TOKENS = 512
ALPHAS = tuple(round(0.05 * step, 2) for step in range(2, 20))


def search_smoothing(
    weights: Sequence[npt.NDArray[np.floating]],
    scheme: WeightScheme,
    statistics: InputStatistics,
    *,
    alphas: Sequence[float] = ALPHAS,
    round_inputs: Callable[[FloatArray], FloatArray] = round_per_token,
    share: Share | None = None,
    name: str = "weight",
) -> ScaleChoice:
    """Search the scale of the inputs that several Linears share.

    Args:
        weights: [N_i, K] of all Linears that read this x. At most 256 evenly spaced rows of each are tried.
        scheme: How they will be stored.
        statistics: With `sample`; at most 512 of its tokens are tried.
        alphas: Values to try.
        round_inputs: How the target rounds activations [T, K].
        share: Makes the scale agree where the operation before demands it.
        name: What an error calls them.

    Raises:
        QuantError: A weight or the sample is not finite, or there is no sample.
    """
    checked = [check_weight(weight, name) for weight in weights]
    tokens = _tokens(statistics, checked[0].shape[1], name)
    largest = np.max([np.abs(weight).max(axis=0) for weight in checked], axis=0)
    rows = [sampled_rows(weight, _MAX_ROWS) for weight in checked]
    wanted = [tokens @ weight.T for weight in rows]

    def error(scale: FloatArray) -> float:
        x = round_inputs(tokens / scale)
        found = (x @ round_to_nearest(weight * scale, scheme).dequantize().T for weight in rows)
        return sum(float(((a - b) ** 2).sum()) for a, b in zip(found, wanted, strict=True))

    best = ScaleChoice(np.ones(checked[0].shape[1], np.float32), 0.0, 1.0)
    plain = error(best.scale)
    for alpha in alphas:
        scale = smoothing_scale(statistics.abs_max, largest, alpha)
        scale = share(scale) if share is not None else scale
        found = error(scale)
        if found < best.error * plain:
            best = ScaleChoice(scale, float(alpha), found / plain)
    return best


def smoothing_scale(input_abs_max: FloatArray, weight_abs_max: FloatArray, alpha: float) -> FloatArray:
    """Return s [K] for one alpha. A channel that is always zero keeps its scale near the others' middle."""
    x, w = np.maximum(input_abs_max, _SMALLEST), np.maximum(weight_abs_max, _SMALLEST)
    return normalised(np.asarray(x**alpha / w ** (1 - alpha), dtype=np.float32))


def _tokens(statistics: InputStatistics, num_inputs: int, name: str) -> FloatArray:
    sample = statistics.sample
    if sample is None or len(sample) == 0:
        raise QuantError(f"{name}: smoothing needs a sample of the inputs; run a calibration that gathers one")
    if sample.shape[1] != num_inputs:
        raise QuantError(f"{name}: the calibration saw {sample.shape[1]} inputs, the weight has {num_inputs}")
    if not np.isfinite(sample).all():
        column = int(np.argmin(np.isfinite(sample).all(axis=0)))
        raise QuantError(f"{name}: input {column} was NaN or infinite during calibration; keep this layer float")
    return sample[:_MAX_TOKENS]
