"""Tiny compiled models for the tests of the pipeline: exported once per test session."""

from collections.abc import Callable
from pathlib import Path

from qcompile.export.export_checkpoint import export_checkpoint
from qcompile.pipeline import OptimizeOptions, OptimizeReport, optimize
from tests.tiny_checkpoints import Tensors, random_tensors, tiny_config, write_safetensors, write_tiny_checkpoint


def export_tiny(directory: Path, model_type: str = "qwen2", dtype: str = "fp32", **overrides) -> Path:
    """Write a tiny checkpoint and export it; returns the compiled-model directory."""
    checkpoint = directory / f"{model_type}-checkpoint"
    write_tiny_checkpoint(checkpoint, model_type, **overrides)
    output = directory / f"{model_type}-{dtype}"
    export_checkpoint(str(checkpoint), output, dtype=dtype)
    return output


def export_changed(directory: Path, change: Callable[[Tensors], None], **overrides) -> Path:
    """Export a tiny Qwen2 in float32 with weights that `change` has changed in place, by their name in the checkpoint."""
    checkpoint = write_tiny_checkpoint(directory / "checkpoint", **overrides)
    tensors = random_tensors(tiny_config(**overrides))
    change(tensors)
    write_safetensors(checkpoint / "model.safetensors", tensors, "float32")
    export_checkpoint(str(checkpoint), directory / "exported")
    return directory / "exported"


def optimize_tiny(source: Path, output: Path, *passes: str, **options) -> OptimizeReport:
    """Optimize with `fuse` unless passes are named."""
    return optimize(source, output, OptimizeOptions(passes=passes or ("fuse",), **options))
