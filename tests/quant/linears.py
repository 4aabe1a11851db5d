"""Weights and inputs for the tests of the algorithms: correlated inputs with a few strong channels, as a model has."""

from __future__ import annotations

import numpy as np

from qcompile.quant import InputStatistics


def inputs(num_tokens: int, num_inputs: int, seed: int = 0) -> np.ndarray:
    """Return float32 [T, K] with correlations, unequal channels and two outliers."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((num_inputs, num_inputs)) * np.exp(-np.arange(num_inputs) / (num_inputs / 6))
    x = rng.standard_normal((num_tokens, num_inputs)) @ mixing.T
    x[:, 3] *= 30
    x[:, num_inputs // 2] *= 10
    return x.astype(np.float32)


def weight(num_outputs: int, num_inputs: int, seed: int = 1) -> np.ndarray:
    """Return float32 [N, K] with heavier tails than a normal distribution."""
    rng = np.random.default_rng(seed)
    spread = np.exp(0.5 * rng.standard_normal((num_outputs, num_inputs)))
    return (rng.standard_normal((num_outputs, num_inputs)) * spread * 0.05).astype(np.float32)


def statistics_of(x: np.ndarray, num_sampled: int | None = None) -> InputStatistics:
    """Return what a calibration on x [T, K] gathers."""
    return InputStatistics(
        len(x), np.abs(x).max(axis=0), np.abs(x).mean(axis=0), x.T @ x, x if num_sampled is None else x[:num_sampled]
    )
