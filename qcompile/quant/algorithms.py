"""Quantize a weight by the name of an algorithm.

`quantize_weight` does one weight. `weight_quantizer` prepares once (GPTQ factors its Hessian) and then takes the rows of
one weight in pieces, or several weights that read the same input. Rows are independent in every algorithm, but a matrix
product rounds differently for another number of rows: compute each piece once and keep it.

    rtn   round to nearest, the scale covers every value
    mse   scales of least squared weight error
    clip  scales of least output error of each group by itself: AWQ's clipping (needs `hessian`)
    gptq  the error of one input is made up for by the others (needs `hessian`)

AWQ, SmoothQuant and the rotation do not round: they change the weights before one of these does, together with the
operation before (`qcompile.quant.awq`, `smooth`, `rotation`, `folding`).
"""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from qcompile.errors import QuantError
from qcompile.quant.clipping import clip
from qcompile.quant.gptq import GptqFactor, gptq
from qcompile.quant.mse import round_with_searched_scales
from qcompile.quant.output_error import hessian_of
from qcompile.quant.rtn import round_to_nearest
from qcompile.quant.scheme import (
    DEFAULT_OPTIONS,
    AlgorithmOptions,
    FloatArray,
    InputStatistics,
    QuantizedWeight,
    Quantizer,
    WeightScheme,
    check_weight,
)

ALGORITHMS = ("rtn", "mse", "clip", "gptq")
NEEDS_HESSIAN = ("clip", "gptq")


def quantize_weight(
    weight: npt.NDArray[np.floating],
    scheme: WeightScheme,
    algorithm: str = "rtn",
    statistics: InputStatistics | None = None,
    *,
    options: AlgorithmOptions | None = None,
    name: str = "weight",
) -> QuantizedWeight:
    """Quantize a weight [N, K] of any float type.

    Args:
        weight: One output channel per row.
        scheme: Bits, groups, symmetry.
        algorithm: One of `ALGORITHMS`.
        statistics: About the inputs; some algorithms need them.
        options: What the algorithm can be told; None for `default_options`.
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
    options: AlgorithmOptions | None = None,
    name: str = "weight",
) -> Quantizer:
    """Return a function from rows [n, K] to their quantized form; arguments as for `quantize_weight`."""
    if algorithm not in ALGORITHMS:
        raise QuantError(f"no quantization algorithm '{algorithm}'; there are: {', '.join(ALGORITHMS)}")
    return _Quantizer(scheme, algorithm, statistics, options or default_options(algorithm), name)


def default_options(algorithm: str) -> AlgorithmOptions:
    """Return what an algorithm is told unless something else is wanted.

    The search for the least error of the weight tries five scales, down to 0.8 of the covering one, and refines the best.
    Forty, down to 0.4, take six times as long; with `mse` they gain nothing that the whole model shows, and with `gptq` no
    less error of the outputs (docs/quantization_graph.md). `clip` looks for the least error of the outputs, which may lie
    further down.
    """
    return replace(DEFAULT_OPTIONS, num_steps=40, smallest_ratio=0.4) if algorithm == "clip" else DEFAULT_OPTIONS


class _Quantizer:
    """One algorithm with all it needs; what depends on the inputs alone is computed at the first rows and kept."""

    def __init__(
        self,
        scheme: WeightScheme,
        algorithm: str,
        statistics: InputStatistics | None,
        options: AlgorithmOptions,
        name: str,
    ) -> None:
        self.scheme, self.algorithm, self.options, self.name = scheme, algorithm, options, name
        self.statistics = statistics
        self._factor: GptqFactor | None = None
        self._lock = threading.Lock()

    def __call__(self, rows: npt.NDArray[np.floating]) -> QuantizedWeight:
        weight = check_weight(rows, self.name)
        if self.algorithm == "rtn":
            return round_to_nearest(weight, self.scheme)
        if self.algorithm == "mse":
            return round_with_searched_scales(weight, self.scheme, self.options)
        hessian = hessian_of(self.statistics, weight.shape[1], self.algorithm, self.name)
        if self.algorithm == "clip":
            return clip(weight, self.scheme, hessian, self.options)
        return gptq(weight, self.scheme, self._gptq_factor(hessian), self.options)

    def _gptq_factor(self, hessian: FloatArray) -> GptqFactor:
        with self._lock:
            if self._factor is None:
                self._factor = GptqFactor.of(hessian, self.options, self.name)
            return self._factor
