"""What a change of a weight does to a Linear's outputs on the calibration inputs.

    sum over tokens of |x W^T - x W'^T|^2 = tr((W - W') H (W - W')^T),    H = sum of x x^T

(the layer-wise objective of GPTQ, Frantar et al. 2022, eq. 1).
"""

from __future__ import annotations

import numpy as np

from qcompile.errors import QuantError
from qcompile.quant.scheme import FloatArray, InputStatistics


def output_error(error: FloatArray, hessian: FloatArray) -> float:
    """Return tr(E H E^T) for E [N, K] and H [K, K]."""
    return float(np.einsum("nk,nk->", error @ hessian, error, dtype=np.float64))


def relative_output_error(weight: FloatArray, quantized: FloatArray, hessian: FloatArray) -> float:
    """Return the squared error of the outputs as a share of their squares."""
    reference = output_error(weight, hessian)
    return output_error(weight - quantized, hessian) / reference if reference > 0 else 0.0


def hessian_of(statistics: InputStatistics | None, num_inputs: int, algorithm: str, name: str) -> FloatArray:
    """Return the Hessian [K, K] of the statistics, checked.

    Raises:
        QuantError: There is none, it is of another Linear, or it has NaN or infinite values.
    """
    if statistics is None or statistics.hessian is None:
        raise QuantError(f"{name}: '{algorithm}' needs the inputs' second moments; run a calibration that gathers them")
    hessian = statistics.hessian
    if hessian.shape != (num_inputs, num_inputs):
        raise QuantError(
            f"{name}: the calibration saw {hessian.shape[0]} inputs, the weight has {num_inputs}: "
            "they are of different layers or models"
        )
    if not np.isfinite(np.diagonal(hessian)).all():
        column = int(np.argmin(np.isfinite(np.diagonal(hessian))))
        raise QuantError(f"{name}: input {column} was NaN or infinite during calibration; keep this layer float")
    return hessian
