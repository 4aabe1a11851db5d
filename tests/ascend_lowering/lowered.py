"""Tiny models lowered for Ascend chips, for the tests here."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qcompile.ascend.buckets import BucketOptions
from qcompile.ascend.lowering.lower import AscendOptions
from qcompile.ascend.reference_session import ReferenceSession
from qcompile.pipeline import OptimizeReport
from qcompile.runtime.manifest import Manifest
from qcompile.runtime.ort_session import open_ort_session
from tests.optimized import export_tiny, optimize_tiny

BUCKETS = BucketOptions(batches=(1, 4), kv_lens=(64, 128), prefill_lens=(16,))


def fuse_tiny(directory: Path, model_type: str = "qwen2", **overrides) -> Path:
    """Export and fuse a tiny checkpoint; returns the portable directory."""
    fused = directory / "fused"
    optimize_tiny(export_tiny(directory, model_type, **overrides), fused, target="portable", verify="off")
    return fused


def lower_tiny(
    fused: Path,
    output: Path,
    target: str = "ascend910b4",
    buckets: BucketOptions = BUCKETS,
    verify: str = "off",
    **options,
) -> OptimizeReport:
    """Lower a fused directory; with `verify`, how large its values become is measured first."""
    ascend = AscendOptions(buckets=buckets, **options)
    return optimize_tiny(fused, output, "fuse", target=target, ascend=ascend, verify=verify)


def reference_session(directory: Path) -> ReferenceSession:
    """Open a lowered directory through the reference bodies."""
    return ReferenceSession(directory, Manifest.load(directory), threads=1)


def fused_logits(fused: Path, prompts: Sequence[Sequence[int]], steps: int) -> tuple[list[list[int]], np.ndarray]:
    """Return `steps` greedy tokens of the fused model after each prompt, and their logits [prompts, steps, V]."""
    session = open_ort_session(fused, Manifest.load(fused), 1, check_hash=False)
    session.reserve(1, max(map(len, prompts)) + steps)
    tokens, logits = [], []
    for prompt in prompts:
        chosen, rows = list[int](), []
        scores = session.forward(0, np.array([prompt], np.int64), [0])
        for step in range(steps):
            assert scores is not None
            rows.append(scores.values[0].copy())
            chosen.append(int(rows[-1].argmax()))
            scores = session.forward(0, np.array([[chosen[-1]]], np.int64), [len(prompt) + step])
        tokens.append(chosen)
        logits.append(np.stack(rows))
    session.close()
    return tokens, np.stack(logits)
