import json

import pytest
from click.testing import CliRunner

from qcompile.cli.main import cli
from tests.optimized import export_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return export_tiny(tmp_path_factory.mktemp("cli"))


def run(*arguments):
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def test_the_command_the_user_named(model, tmp_path):
    result = run("optimize", model / "model.onnx", "--passes", "fuse,int8", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "qcompile.json").is_file()
    assert "fuse-attention" in result.output
    assert "int8-norm" in result.output


def test_a_sentence_is_a_line_where_there_is_no_terminal(model, tmp_path):
    result = run("optimize", model, "--verify", "full", "-o", tmp_path / "out")
    (line,) = [line for line in result.output.splitlines() if line.startswith("whole model: ")]
    assert "mean KL" in line


def test_default_output_is_beside_the_model(model):
    result = run("optimize", model, "--target", "portable")
    assert result.exit_code == 0, result.output
    assert (model.with_name(f"{model.name}-portable") / "model.onnx").is_file()


def test_json_and_report_say_the_same(model, tmp_path):
    report = tmp_path / "report.json"
    result = run("optimize", model, "-o", tmp_path / "out", "--json", "--report", report)
    printed = json.loads(result.stdout)
    assert json.loads(report.read_text()) == printed
    counts = {record["name"]: record["rewrites"] for record in printed["passes"] if record["name"].startswith("fuse")}
    assert counts["fuse-attention"] == 2
    assert counts["fuse-add-rms-norm"] == 4


def test_refused_places_that_are_not_shown_are_counted(model, tmp_path):
    kept = ["--keep-float", "layers.*", "--verify", "off"]
    result = run("optimize", model, "-o", tmp_path / "out", "--passes", "fuse,int8-weight", *kept)
    assert result.exit_code == 0
    assert result.output.count("int8-weight: ") == 6
    assert "int8-weight: and 3 more" in result.output


def test_dry_run_says_so(model, tmp_path):
    result = run("optimize", model, "-o", tmp_path / "out", "--dry-run")
    assert result.exit_code == 0
    assert "nothing was written" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--passes", "fuse,int9"], "unknown pass 'int9'; did you mean 'int8'?"),
        (["--passes", ""], "--passes '': names no pass"),
        (["--passes", ","], "--passes ',': names no pass"),
        (
            ["--passes", "fuse,int8", "--keep-float", "*"],
            "int8-norm: keep_float is '*': all 10 weights would stay float; name fewer layers with --keep-float, or leave",
        ),
        (["--passes", "fuse,int4", "--keep-float", "lm_head", "--keep-float", "layers.*"], "int4: keep_float is"),
        (["--target", "ort", "--attention", "matmul"], "shape graphs for Ascend; --target is ort"),
        (["--target", "ort", "--plugins", ""], "shape graphs for Ascend; --target is ort"),
        (["--target", "ascendd"], "unknown target 'ascendd'"),
        (["--surgery", "nowhere.py:f"], "nowhere.py"),
        (["--strict", "--skip", "fuse-attention"], "--strict:"),
    ],
)
def test_errors_are_one_line_with_exit_code_1(model, tmp_path, arguments, message):
    result = run("optimize", model, "-o", tmp_path / "out", *arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
    assert len([line for line in result.output.splitlines() if line.startswith("Error")]) == 1
    assert not (tmp_path / "out").exists()


def test_usage_errors_have_exit_code_2(model, tmp_path):
    assert run("optimize", tmp_path / "absent.onnx").exit_code == 2
    assert run("optimize", model, "--verify", "sometimes").exit_code == 2
    assert run("optimise").exit_code == 2


def test_something_else_in_the_way_is_not_overwritten(model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    result = run("optimize", model, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_debug_shows_the_traceback(model, tmp_path):
    result = run("--debug", "optimize", model, "-o", tmp_path / "out", "--passes", "nothing")
    assert result.exit_code == 1
    assert "Traceback" in result.output


def test_help_lists_every_command_without_importing_them():
    result = run("--help")
    assert result.exit_code == 0
    for name in ("export", "fetch", "optimize", "verify", "inspect", "generate", "chat"):
        assert name in result.output
