"""`qcompile inspect`: tables, JSON, the page, and the reasons of a fusion that did not fire."""

import json
import shutil

import pytest
from click.testing import CliRunner

from qcompile.cli.inspect import command
from qcompile.errors import ArtifactError, GraphError, PassError
from qcompile.passes import registry
from qcompile.passes.base import Pass, Rejection
from qcompile.runtime.errors import ManifestError
from tests.report.fused_graphs import GRAPHS

GRAPH = str(GRAPHS / "qwen2-builder.onnx")
OTHER = str(GRAPHS / "qwen2-dynamo-opset23.onnx")


@pytest.fixture
def run():
    runner = CliRunner()
    return lambda *arguments: runner.invoke(command, [str(a) for a in arguments])


def test_one_model(run):
    result = run(GRAPH)
    assert result.exit_code == 0
    for line in ("Totals", "Operators", "Weights by dtype", "Inputs and outputs"):
        assert line in result.output
    assert "present.{0…1}.value" in result.output


def test_two_models_as_json(run):
    result = run(GRAPH, OTHER, "--json")
    assert result.exit_code == 0
    first, second = json.loads(result.stdout)["models"]
    assert first["path"] == GRAPH
    assert first["ops"]["Softmax"] == 2
    assert "Softmax" not in second["ops"]
    assert first["parameters"] - 8 <= second["parameters"] <= first["parameters"] + 8
    assert first["inputs"][0] == {
        "name": "input_ids",
        "dtype": "int64",
        "shape": ["batch_size", "sequence_length"],
    }
    assert first["weight_bytes"] == sum(total["size_bytes"] for total in first["weights"].values())


def test_two_models_side_by_side(run):
    result = run(GRAPH, OTHER)
    rows = {line.split()[0]: line.split()[1:] for line in result.output.splitlines() if line.strip()}
    assert rows["RMSNormalization"] == ["-", "5", "new"]
    assert rows["Softmax"] == ["2", "-", "gone"]


def test_the_page_and_the_json_together(run, tmp_path):
    result = run(GRAPH, OTHER, "--html", tmp_path / "page.html", "--json")
    assert result.exit_code == 0
    assert len(json.loads(result.stdout)["models"]) == 2
    assert f"{tmp_path / 'page.html'}: written" in result.stderr
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "qwen2-builder.onnx" in page


def test_a_directory_without_manifest(run, tmp_path):
    shutil.copy(GRAPH, tmp_path / "model.onnx")
    result = run(tmp_path, "--json")
    assert json.loads(result.stdout)["models"][0]["target"] is None


class _NearMisses(Pass):
    """A pass that refuses one place and nearly matches another."""

    name = "fuse-near"

    def call(self, context, result):
        result.rejected.append(Rejection("refused [red]node", "Near", "its weight is not a constant"))

    def explain(self, context):
        names = [node.op_type for node in context.model.graph]
        assert "Softmax" in names
        return [
            Rejection("refused [red]node", "Near", "its weight is not a constant"),
            Rejection("close", "Near", "wanted Mul"),
        ]


@pytest.fixture
def near(monkeypatch):
    monkeypatch.setitem(registry.PASSES, "fuse-near", _NearMisses)
    monkeypatch.setattr(registry, "FUSE", (_NearMisses,))


def test_why_a_fusion_did_not_fire(run, near):
    result = run(GRAPH, "--why", "fuse-near")
    assert result.exit_code == 0
    words = " ".join(result.output.split())
    assert "Nearest misses of fuse-near" in words
    assert "refused [red]node Near its weight is not a constant" in words
    assert "close Near wanted Mul" in words


def test_why_as_json_lists_each_miss_once(run, near):
    assert json.loads(run(GRAPH, "--why", "fuse-near", "--json").stdout) == {
        "pass": "fuse-near",
        "misses": [
            {"node": "refused [red]node", "rule": "Near", "reason": "its weight is not a constant"},
            {"node": "close", "rule": "Near", "reason": "wanted Mul"},
        ],
    }


def test_why_of_the_real_fusions(run):
    listed = json.loads(run(GRAPHS / "layernorm-gelu-dynamo18.onnx", "--why", "fuse", "--json").stdout)
    assert listed["pass"] == "fuse"
    assert all(set(miss) == {"node", "rule", "reason"} for miss in listed["misses"])


def test_nothing_missed_is_said_so(run):
    result = run(GRAPH, "--why", "eliminate-dead-code")
    assert "no near misses" in result.output
    assert json.loads(run(GRAPH, "--why", "eliminate-dead-code", "--json").stdout)["misses"] == []


def test_why_of_a_lowering_runs_what_comes_before_it(run):
    listed = json.loads(run(GRAPH, "--why", "lower-to-ort", "--json").stdout)
    assert listed["pass"] == "lower-to-ort"


def test_why_takes_one_model(run):
    result = run(GRAPH, OTHER, "--why", "fuse")
    assert result.exit_code == 2
    assert "--why takes one model" in result.output


def test_why_and_the_page_do_not_mix(run, tmp_path):
    result = run(GRAPH, "--why", "fuse-gelu", "--html", tmp_path / "page.html")
    assert result.exit_code == 2
    assert "--why" in result.output
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_read_is_one_line(run, tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "qcompile.json").write_text("{")
    for name, kind, message in (
        ("none.onnx", GraphError, "no such file"),
        ("bad.onnx", GraphError, "is not an ONNX model"),
        ("damaged", ManifestError, "cannot be read"),
        ("empty", GraphError, "holds neither"),
    ):
        error = run(tmp_path / name).exception
        assert isinstance(error, kind)
        assert message in str(error)
        assert "\n" not in str(error)


def test_an_unknown_pass_suggests_the_nearest(run):
    error = run(GRAPH, "--why", "fuse-rmsnorm").exception
    assert isinstance(error, PassError)
    assert "did you mean 'fuse-rms-norm'?" in str(error)


def test_a_page_in_a_missing_directory(run, tmp_path):
    error = run(GRAPH, "--html", tmp_path / "none" / "page.html").exception
    assert isinstance(error, ArtifactError)
    assert "cannot be written" in str(error)
