"""Tiny compiled models for the tests of the pipeline: exported once per test session."""

from pathlib import Path

from qcompile.export.export_checkpoint import export_checkpoint
from qcompile.pipeline import OptimizeOptions, OptimizeReport, optimize
from tests.tiny_checkpoints import write_tiny_checkpoint


def export_tiny(directory: Path, model_type: str = "qwen2", dtype: str = "fp32", **overrides) -> Path:
    """Write a tiny checkpoint and export it; returns the compiled-model directory."""
    checkpoint = directory / f"{model_type}-checkpoint"
    write_tiny_checkpoint(checkpoint, model_type, **overrides)
    output = directory / f"{model_type}-{dtype}"
    export_checkpoint(str(checkpoint), output, dtype=dtype)
    return output


def optimize_tiny(source: Path, output: Path, *passes: str, **options) -> OptimizeReport:
    """Optimize with `fuse` unless passes are named."""
    return optimize(source, output, OptimizeOptions(passes=passes or ("fuse",), **options))
