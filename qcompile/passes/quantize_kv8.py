"""Find the scales of an int8 KV cache: one per channel of each key and value head, from calibration.

    code = clip(round(x / scale), -128, 127),     scale = max|x| / 127 over the calibration text

Keys are cached behind the rotary embedding, which turns channels i and i + d/2 into each other as positions grow: both take
the larger of their two maxima. So a channel that k_proj's bias makes large (Qwen2: up to 200 times the median) has a scale
of its own and costs the others nothing. First tokens, whose keys are unlike all others, count like the rest.

This pass only looks; `lower_kv8_to_ort` changes the cache. A target without such a lowering does not take kv8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from qcompile.calibration.accumulate import KeyValueStatistics
from qcompile.calibration.store import Calibration
from qcompile.errors import QuantError
from qcompile.passes.base import Pass, PassContext, PassResult, Rejection

KV8 = "qcompile.kv8"
_INT8_MAX = 127
_SMALLEST = 1e-6


class KeyValueSource(Protocol):
    """Calibrates a model."""

    def prepare(self, model: ir.Model) -> Calibration:
        """Return the statistics of its KV cache, among others."""


@dataclass(frozen=True)
class CacheScales:
    """Scales of one layer's cache: float32 [K, d] each."""

    key: np.ndarray
    value: np.ndarray


class QuantizeKv8(Pass):
    """Scales of an int8 KV cache.

    Args:
        statistics: What calibrates the model; without it nothing is found.
    """

    name = "kv8"
    summary = "KV cache -> int8 with a calibrated scale per channel"

    def __init__(self, statistics: KeyValueSource | None = None) -> None:
        self.statistics = statistics

    def call(self, context: PassContext, result: PassResult) -> None:
        """Calibrate, and keep the scales with the model in memory for the lowering.

        Raises:
            QuantError: The model has no cache, or cannot be calibrated.
        """
        if self.statistics is None:
            result.rejected.append(
                Rejection("graph", self.name, "its scales come from calibration: `qcompile optimize`")
            )
            return
        names = [v.name or "" for v in context.model.graph.inputs]
        layers = sum(name.startswith("past_key_values.") and name.endswith(".key") for name in names)
        if not layers:
            raise QuantError("kv8: the model has no KV cache; export a decoder with past_key_values inputs")
        calibration = self.statistics.prepare(context.model)
        scales = {layer: cache_scales(calibration.key_values(layer)) for layer in range(layers)}
        context.model.meta[KV8] = scales
        result.matches = result.rewrites = layers
        spread = [float(np.max(s.key) / np.median(s.key)) for s in scales.values()]
        result.detail["kv8"] = {"bits": 8, "granularity": "channel", "largest_over_median_key_scale": spread}


def cache_scales(seen: KeyValueStatistics) -> CacheScales:
    """Return the scales that cover what was seen, first tokens included."""
    key = np.maximum(seen.key_abs_max, seen.first_key_abs_max)
    value = np.maximum(seen.value_abs_max, seen.first_value_abs_max)
    half = key.shape[1] // 2
    pairs = np.maximum(key[:, :half], key[:, half:])
    return CacheScales(_scale(np.concatenate([pairs, pairs], axis=1)), _scale(value))


def _scale(largest: np.ndarray) -> np.ndarray:
    return np.asarray(np.maximum(largest, _SMALLEST) / np.float32(_INT8_MAX), dtype=np.float32)
