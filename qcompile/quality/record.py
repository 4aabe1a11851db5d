"""A quality report as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np

from qcompile.quality.compare import QualityReport
from qcompile.quality.divergence import Floats
from qcompile.quality.layers import HalfBlock, LayerReport

# Bins of the histogram of KL per token, one per half decade; the first holds everything below 1e-8.
HISTOGRAM_DECADES = (-8.0, 2.0)


def record_of(report: QualityReport) -> dict[str, Any]:
    """Return JSON-ready data; numbers that JSON does not know (infinity) become None."""
    record = {
        "reference": report.reference,
        "other": report.other,
        "text": report.text,
        "overall": asdict(report.overall),
        "groups": {name: asdict(summary) for name, summary in report.groups.items()},
        "kl_histogram": histogram(report.scores.kl),
        "greedy": {
            "prompts": [asdict(g) for g in report.greedy],
            "mean_same": float(np.mean([g.num_same for g in report.greedy])) if report.greedy else None,
            "num_identical": sum(g.num_same == g.num_tokens for g in report.greedy),
        },
        "layers": layers_record(report.layers),
        "worst_tokens": [asdict(w) for w in report.worst],
        "notes": report.notes,
        "seconds": round(report.seconds, 3),
    }
    return {key: _finite(value) for key, value in record.items()}


def layers_record(layers: LayerReport) -> dict[str, Any]:
    """Return the hidden states' part."""
    return {
        "limit": layers.limit,
        "first_divergence": _block(layers.first_divergence),
        "largest_step": _block(layers.largest_step),
        "reason": layers.reason,
        "blocks": [asdict(b) for b in layers.blocks],
    }


def histogram(kl: Floats) -> dict[str, list[float]]:
    """Count tokens by KL on a logarithmic axis: `counts[i]` have `edges[i] <= KL < edges[i + 1]`.

    The outer bins also hold what lies beyond.
    """
    low, high = HISTOGRAM_DECADES
    edges = 10.0 ** np.arange(low, high + 0.5, 0.5)
    clipped = np.clip(kl, edges[0], edges[-1] * (1 - 1e-12))
    counts, _ = np.histogram(clipped, bins=edges)
    return {"edges": [float(e) for e in edges], "counts": [int(c) for c in counts]}


def _block(block: HalfBlock | None) -> dict[str, Any] | None:
    return None if block is None else asdict(block)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
