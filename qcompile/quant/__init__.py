"""Quantizers: NumPy in, NumPy out. Nothing here knows a graph."""

from qcompile.quant.algorithms import ALGORITHMS, quantize_weight, weight_quantizer
from qcompile.quant.scheme import AlgorithmOptions, InputStatistics, QuantizedWeight, Quantizer, WeightScheme

__all__ = [
    "ALGORITHMS",
    "AlgorithmOptions",
    "InputStatistics",
    "QuantizedWeight",
    "Quantizer",
    "WeightScheme",
    "quantize_weight",
    "weight_quantizer",
]
