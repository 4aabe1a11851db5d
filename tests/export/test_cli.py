"""`qcompile export` as a command: what it prints, what it writes, how it fails."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qcompile.cli.export import command
from qcompile.errors import ArtifactError, ExportError
from qcompile.runtime.manifest import Manifest
from tests.graphs_on_disk import file_size_limit
from tests.tiny_checkpoints import write_tiny_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tiny_checkpoint(tmp_path / "in", "qwen3")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)


def test_a_summary_for_people_and_a_path_for_scripts(source: Path, tmp_path: Path) -> None:
    result = run(source, "-o", tmp_path / "out")
    assert result.exit_code == 0
    assert result.stdout == f"{tmp_path / 'out'}\n"
    assert "qwen3, 2 layers, 0.2 M parameters, fp32, 182 nodes" in result.stderr
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.target == "portable"
    assert manifest.graph().io.dtype == "float32"


def test_json(source: Path, tmp_path: Path) -> None:
    record = json.loads(run(source, "-o", tmp_path / "out", "--dtype", "bf16", "--json").stdout)
    assert record["manifest"]["source"]["dtype"] == "bf16"
    assert record["manifest"]["graphs"][0]["io"]["dtype"] == "bfloat16"
    assert record["manifest"]["config"]["head_dim"] == 32
    assert record["num_parameters"] == 176_576
    assert record["size_bytes"] > 2 * record["num_parameters"]


def test_no_tie(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "in", "qwen2")
    for flag, wanted in (([], "tied"), (["--no-tie"], "separate")):
        record = json.loads(run(tmp_path / "in", "-o", tmp_path / "out", "--json", *flag).stdout)
        assert record["manifest"]["source"]["embeddings"] == wanted


@pytest.mark.torch
def test_via_torch(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    record = json.loads(run(source, "-o", tmp_path / "out", "--via", "torch", "--json").stdout)
    assert record["manifest"]["source"]["via"] == "torch"


def test_usage_errors_are_two(source: Path, tmp_path: Path) -> None:
    assert run(source).exit_code == 2
    assert run(source, "-o", tmp_path / "out", "--dtype", "int8").exit_code == 2


def test_failures_are_raised_for_the_group_to_report(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no such file or directory"):
        run(tmp_path / "absent", "-o", tmp_path / "out")
    with pytest.raises(ArtifactError, match="is not a compiled-model directory"):
        run(source, "-o", source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_disk_that_fills_up(source: Path, tmp_path: Path) -> None:
    with (
        file_size_limit(100_000),
        pytest.raises(ArtifactError, match=r"/out/model\.onnx\.data: cannot be written: .*free some space"),
    ):
        run(source, "-o", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
