import json
import shutil
import xml.etree.ElementTree as ET

import pytest
from click.testing import CliRunner

from qcompile.benchmark.presentation import chart_of
from qcompile.benchmark.run import BenchOptions, run_benchmark, run_in_process
from qcompile.cli.main import cli
from qcompile.errors import BenchmarkError
from tests.optimized import export_tiny, optimize_tiny

RATES = {"read_bytes_per_s": 1e9, "copy_bytes_per_s": 1e9, "fp32_ops_per_s": 1e11, "int8_ops_per_s": 4e11}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bench")
    optimize_tiny(export_tiny(directory), directory / "ort")
    return directory / "ort"


def fake(calls):
    """Children that take known times and remember what they were asked."""

    def run_module(module, job):
        calls.append((module.rpartition(".")[2], len(job.get("prompts", [])), len(job.get("prompts", [[]])[0])))
        if module.endswith("floor"):
            return RATES
        rows, context = len(job["prompts"]), len(job["prompts"][0])
        return {
            "load_s": 1.0, "loaded_rss_bytes": 5, "ttft_s": context / 100, "prefill_s": 1.0, "decode_s": 2.0,
            "decode_tokens": rows * job["steps"], "mean_context": context + 10.0, "peak_rss_bytes": 1 << 20,
        }  # fmt: skip

    return run_module


def test_every_round_runs_every_case_once(model):
    calls = []
    report = run_benchmark(model, BenchOptions(repetitions=2), run_module=fake(calls))
    one_round = [("floor", 0, 0), *[("child", b, c) for b in (1, 4, 8) for c in (128, 1024)]]
    assert calls == one_round * 2
    assert report.row("prefill", 1, 1024).value.median == pytest.approx(100)
    assert report.row("decode", 8, 128).value.median == pytest.approx(8 * 48 / 2)
    assert report.row("decode", 8, 128).value.count == 2
    assert report.floor["read_bytes_per_s"].median == 1e9
    size = sum(p.stat().st_size for p in model.iterdir() if p.name != "qcompile.json")
    assert report.model["directory_bytes"] == size
    assert json.loads(json.dumps(report.record(), allow_nan=False))["rows"]


def test_a_context_the_model_cannot_hold_is_a_visible_row(tmp_path):
    source = export_tiny(tmp_path, max_position_embeddings=512)
    report = run_benchmark(source, BenchOptions(quick=True), run_module=fake([]))
    row = report.row("decode", 1, 1024)
    assert row.value is None
    assert "the model holds 512" in row.reason
    assert report.row("decode", 1, 128).value is not None
    assert any("the model holds 512" in note for note in chart_of(report).notes)


def test_nothing_that_runs_is_an_error(model):
    rounds = []

    def broken(module, job):
        if module.endswith("floor"):
            rounds.append(module)
        return RATES if module.endswith("floor") else {"error": "no memory"}

    with pytest.raises(BenchmarkError, match="no case could be run: no memory"):
        run_benchmark(model, BenchOptions(), run_module=broken)
    assert len(rounds) == 1
    with pytest.raises(BenchmarkError, match="rates could not be measured: lost"):
        run_benchmark(model, BenchOptions(quick=True), run_module=lambda module, job: {"error": "lost"})


def test_another_machines_model_is_refused(model, tmp_path):
    other = tmp_path / "npu"
    shutil.copytree(model, other)
    manifest = json.loads((other / "qcompile.json").read_text(encoding="utf-8"))
    (other / "qcompile.json").write_text(json.dumps(manifest | {"target": "ascend910b4"}), encoding="utf-8")
    with pytest.raises(BenchmarkError, match="compiled for ascend910b4"):
        run_benchmark(other, BenchOptions(quick=True), run_module=fake([]))


def test_a_child_that_dies_is_reported(tmp_path):
    assert run_in_process("qcompile.no_such_module", {})["error"].startswith("the process ended with 1: ")
    assert "no qcompile.json" in run_in_process(
        "qcompile.benchmark.child", {"directory": str(tmp_path), "prompts": [[1]], "room": 1, "threads": 1,
                                     "max_model_len": 8, "steps": 1}
    )["error"]  # fmt: skip


def test_command_line(model, tmp_path):
    """The real thing, on a tiny model: real children, a page and a picture."""
    page, picture = tmp_path / "a.html", tmp_path / "a.svg"
    result = CliRunner().invoke(cli, ["bench", str(model), "--quick", "--threads", "1", "--json", "--html", str(page)])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    measured = [r for r in record["rows"] if r["value"] is not None]
    assert len(measured) == len(record["rows"]) == 2 + 3 + 2 + 3 + 1
    assert all(r["value"]["median"] > 0 for r in measured)
    peak = next(r for r in measured if r["metric"] == "peak rss")
    assert peak["value"]["median"] > 20 << 20
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")
    report = run_benchmark(model, BenchOptions(quick=True), run_module=fake([]))
    chart_of(report).write(picture)
    assert ET.fromstring(picture.read_text(encoding="utf-8")).tag.endswith("svg")


def test_tables(model, monkeypatch):
    monkeypatch.setattr("qcompile.benchmark.run.run_in_process", fake([]))
    result = CliRunner().invoke(cli, ["bench", str(model), "--quick"])
    assert result.exit_code == 0, result.output
    for word in ("prefill", "decode", "ttft", "peak rss", "load", "reached", "GB/s"):
        assert word in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["absent"], 1, "no qcompile.json"),
        ([__file__], 1, f"{__file__}: no qcompile.json"),
        (["absent", "--repetitions", "0"], 2, "--repetitions"),
        (["absent", "--threads", "0"], 2, "--threads"),
        ([], 2, "Missing argument"),
    ],
)
def test_bad_input_is_one_line(arguments, code, message):
    result = CliRunner().invoke(cli, ["bench", *arguments])
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.output
