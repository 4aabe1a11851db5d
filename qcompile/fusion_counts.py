"""How many fusions a decoder of a known size has places for; fewer than that deserves a warning."""

from __future__ import annotations

from collections.abc import Mapping

from qcompile.runtime.manifest import ModelShape


def expected_counts(shape: ModelShape, passes: set[str]) -> dict[str, int]:
    """Return rewrites per pass for a Qwen2 or Qwen3 decoder with L layers.

    Norms: 2L + 1, and 2L more on q and k for Qwen3; all but the first are after a residual Add. One attention with a
    rotary embedding of q and of k, one packed QKV, one packed gate/up with its SwiGLU per layer.
    """
    layers = shape.num_hidden_layers
    head_norms = 2 * layers if shape.model_type == "qwen3" else 0
    counts = {
        "fuse-rms-norm": 2 * layers + 1 + head_norms,
        "fuse-swiglu": layers,
        "fuse-rotary-embedding": 2 * layers,
        "fuse-attention": layers,
        "fuse-qkv": layers,
        "fuse-gate-up": layers,
        "fuse-add-rms-norm": 2 * layers,
    }
    if shape.model_type not in {"qwen2", "qwen3"}:
        return {}
    return {name: count for name, count in counts.items() if name in passes}


def missing_fusions(expected: Mapping[str, int], seen: Mapping[str, int]) -> list[str]:
    """Return one line per pass that fired less often than expected."""
    return [
        f"{name}: {seen.get(name, 0)} of {count} places; see `qcompile inspect MODEL --why {name}`"
        for name, count in expected.items()
        if seen.get(name, 0) < count
    ]
