"""Tiny models compiled by the stand-in for ATC."""

import shutil
from pathlib import Path

from click.testing import CliRunner

from qcompile.ascend.buckets import BucketOptions
from qcompile.cli.atc import command
from tests.ascend_lowering.lowered import fuse_tiny, lower_tiny

# chunks of 16 tokens, one decode graph for four slots
SMALL = BucketOptions(batches=(4,), kv_lens=(128,), prefill_lens=(16,))


def simulate(directory: Path, *arguments: str) -> Path:
    """Run `qcompile atc DIR --simulate`; returns the directory."""
    result = CliRunner().invoke(command, [str(directory), "--simulate", *arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return directory


def compile_simulated(
    directory: Path, model_type: str = "qwen2", *, buckets: BucketOptions = SMALL, cann: str = "8.1", **options: object
) -> tuple[Path, Path]:
    """Export, fuse, lower and compile a tiny model; returns the fused directory and the compiled one."""
    fused = fuse_tiny(directory, model_type)
    lower_tiny(fused, directory / "compiled", buckets=buckets, **options)
    return fused, simulate(directory / "compiled", "--cann", cann)


def copied(directory: Path, target: Path) -> Path:
    """Return a copy that a test may damage."""
    return Path(shutil.copytree(directory, target))
