import json

import pytest
from click.testing import CliRunner

from qcompile.cli.main import cli
from tests.optimized import export_tiny, optimize_tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("verify")
    source = export_tiny(directory)
    optimize_tiny(source, directory / "fused")
    optimize_tiny(source, directory / "int8", "fuse", "int8")
    return {"source": source, "fused": directory / "fused", "int8": directory / "int8"}


def run(*arguments):
    return CliRunner().invoke(cli, ["verify", *(str(a) for a in arguments)])


@pytest.mark.parametrize("other", ["fused", "int8"])
def test_models_that_agree(models, other):
    result = run(models["source"], models[other], "--tokens", 16)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("agree:")


def test_json(models):
    record = json.loads(run(models["source"], models["fused"], "--tokens", 8, "--json").stdout)
    assert record["holds"] is True
    assert record["num_tokens"] == record["same_tokens"] == 24


def test_models_that_differ_have_exit_code_1(models, tmp_path):
    other = export_tiny(tmp_path, "qwen2", rms_norm_eps=0.5)
    result = run(models["source"], other, "--tokens", 8)
    assert result.exit_code == 1
    assert result.stdout.startswith("DIFFER:")


def test_not_a_model(models, tmp_path):
    (tmp_path / "empty").mkdir()
    result = run(models["source"], tmp_path / "empty")
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert "Error" in result.output
