"""Quantize a weight by the name of an algorithm.

`quantize_weight` does one weight. `weight_quantizer` prepares once (GPTQ factors its Hessian) and then takes the rows of
one weight in pieces, or several weights that read the same input. Rows are independent in every algorithm, but a matrix
product rounds differently for another number of rows: compute each piece once and keep it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qcompile.errors import QuantError
from qcompile.quant.rtn import round_to_nearest
from qcompile.quant.scheme import (
    DEFAULT_OPTIONS,
    AlgorithmOptions,
    InputStatistics,
    QuantizedWeight,
    Quantizer,
    WeightScheme,
    check_weight,
)

ALGORITHMS = ("rtn",)


def quantize_weight(
    weight: npt.NDArray[np.floating],
    scheme: WeightScheme,
    algorithm: str = "rtn",
    statistics: InputStatistics | None = None,
    *,
    options: AlgorithmOptions = DEFAULT_OPTIONS,
    name: str = "weight",
) -> QuantizedWeight:
    """Quantize a weight [N, K] of any float type.

    Args:
        weight: One output channel per row.
        scheme: Bits, groups, symmetry.
        algorithm: One of `ALGORITHMS`.
        statistics: About the inputs; some algorithms need them.
        options: What the algorithm can be told.
        name: What an error calls the weight.

    Raises:
        QuantError: The weight has NaN or infinite values, the algorithm is unknown, or it lacks statistics.
    """
    quantizer = weight_quantizer(scheme, algorithm, statistics, options=options, name=name)
    return quantizer(check_weight(weight, name))


def weight_quantizer(
    scheme: WeightScheme,
    algorithm: str = "rtn",
    statistics: InputStatistics | None = None,
    *,
    options: AlgorithmOptions = DEFAULT_OPTIONS,
    name: str = "weight",
) -> Quantizer:
    """Return a function from rows [n, K] to their quantized form; arguments as for `quantize_weight`."""
    if algorithm not in ALGORITHMS:
        raise QuantError(f"no quantization algorithm '{algorithm}'; there are: {', '.join(ALGORITHMS)}")
    del statistics, options

    def quantize(rows: npt.NDArray[np.floating]) -> QuantizedWeight:
        return round_to_nearest(check_weight(rows, name), scheme)

    return quantize
