"""The stand-in for ATC: flags, log lines, exit codes; and `qcompile atc --simulate` around it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from qcompile.ascend.atc_errors import explain_failure
from qcompile.ascend.om_reader import read_om
from qcompile.ascend.sim.atc import main
from qcompile.ascend.sim.model_file import open_simulated
from qcompile.cli.main import cli
from qcompile.runtime.manifest import Manifest, check_file
from tests.ascend.faults import changed, renamed
from tests.ascend.faults_nodes import NODE_FAULTS
from tests.ascend.graphs import CLEAN, dynamic_w8a8, norm_model, saved
from tests.ascend_sim.simulated import copied
from tests.graphs_on_disk import file_size_limit

CHIP = "--soc_version=Ascend910B4"


def atc(directory: Path, capsys: pytest.CaptureFixture[str], *flags: str, model: str = "m.onnx") -> tuple[int, str]:
    """Run the stand-in as ATC is run; returns exit code and log."""
    given = ["--framework=5", f"--model={directory / model}", f"--output={directory / 'm'}", *flags]
    code = main(given)
    return code, capsys.readouterr().out


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    saved(norm_model(), tmp_path, "m.onnx")
    return tmp_path


def test_a_legal_graph_becomes_a_file_that_says_what_it_is(graph: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, log = atc(graph, capsys, CHIP, "--input_format=ND", "--log=error")
    assert code == 0
    assert log.startswith("ATC start working now, please wait for a moment.")
    assert "ATC run success, welcome to the next use." in log
    om = read_om(graph / "m.om")
    assert om.header.platform_version == "simulated"
    assert om.models[0].soc_version == "Ascend910B4"
    assert [port.name for port in om.models[0].inputs] == [value.name for value in norm_model().graph.input]
    assert "--soc_version=Ascend910B4" in om.models[0].attributes["atc_cmdline"]
    assert om.models[0].ops["NPURmsNorm"] == 1
    assert open_simulated(graph / "m.om").inside_bytes == om.models[0].weight_bytes


@pytest.mark.parametrize("name", CLEAN)
def test_clean_graphs_compile(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(CLEAN[name](), tmp_path, "m.onnx")
    code, log = atc(tmp_path, capsys, CHIP, "--external_weight=1")
    assert code == 0, log
    found = open_simulated(tmp_path / "m.om")
    assert [value.name for value in found.graph.graph.inputs] == [port.name for port in found.model.inputs]
    assert sorted(found.weights) == sorted(file.name for file in (tmp_path / "weight").glob("*"))


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        ([], "E10054", "soc_version"),
        (["--soc_version=Ascend910B7"], "E10001", "did you mean Ascend910B4"),
        ([CHIP, "--mode=1"], "E10001", "--mode=0"),
        ([CHIP, "--log=loud"], "E10010", "loud"),
        ([CHIP, "--precision_mode=force_fp16", "--precision_mode_v2=fp16"], "E10047", "together"),
        ([CHIP, "--input_shape=nothing:1"], "E10016", "Opname nothing specified in --input_shape"),
        ([CHIP, "--input_shape=x:-1,8,64"], "E10011", "not a positive number"),
        ([CHIP, "--dynamic_batch_size=1,2"], "E10012", "no dimension of --input_shape is -1"),
        ([CHIP, "--input_shape=x:-1,8,64", "--dynamic_batch_size=1"], "E10035", "1 gears"),
        ([CHIP, "--input_shape=x:1,-1,64", "--dynamic_batch_size=1,2"], "E10018", "only the first dimension"),
        ([CHIP, "--input_shape=x:-1,-1,64", "--dynamic_dims=1,2;3"], "E10045", "as many numbers"),
        ([CHIP, "--input_shape=x:-1,8,64", "--dynamic_batch_size=1,2", "--dynamic_dims=1;2"], "E10009", "exclude"),
        ([CHIP, "--no_such_flag=1"], "E10001", "unknown command line flag 'no_such_flag'"),
        (["--model=missing.onnx", CHIP], "E10410", "missing.onnx"),
    ],
)
def test_what_is_wrong_with_the_flags(
    flags: list[str], code: str, words: str, graph: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    returned, log = atc(graph, capsys, *flags)
    assert returned == 255
    assert "ATC run failed, Please check the detail log" in log
    assert re.search(rf"^{code}: \[PID: \d+\]", log, re.MULTILINE)
    assert words in log
    assert not (graph / "m.om").exists()
    assert explain_failure(log, returned).code == code


def test_required_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([CHIP]) == 255
    assert "E10007" in capsys.readouterr().out


FAULTS = {
    fault.name: fault
    for fault in NODE_FAULTS
    if fault.options is None and fault.chip == "910b4" and fault.code in {"E16002", "EZ3002", "E20001"}
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_the_check_refuses_it_refuses_with_that_code(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(FAULTS[name].build(), tmp_path, "m.onnx")
    report = CliRunner().invoke(cli, ["check", str(tmp_path / "m.onnx"), "--target", "ascend910b4", "--json"])
    certain = [
        f["code"]
        for f in json.loads(report.stdout)["graphs"][0]["findings"]
        if f["certain"] and f["effect"] == "refused"
    ]
    code, log = atc(tmp_path, capsys, CHIP)
    assert (code == 255) == bool(certain)
    if certain:
        assert explain_failure(log, code).code == certain[0]
        assert not (tmp_path / "m.om").exists()


def test_a_full_disk(graph: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with file_size_limit(200):
        code, log = atc(graph, capsys, CHIP)
    assert code == 255
    assert "E13004" in log
    assert sorted(path.name for path in graph.iterdir()) == ["m.onnx"]


# qcompile atc --simulate


def simulated(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli, ["atc", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_the_manifest_says_it(compiled_om: Path) -> None:
    manifest = Manifest.load(compiled_om)
    assert manifest.build["simulated"] is True
    assert manifest.build["soc_version"] == "Ascend910B4"
    for entry in manifest.graphs:
        assert entry.file.name.endswith(".om")
        for file in (entry.file, *entry.data):
            check_file(compiled_om, file)
    first, second = manifest.graphs
    assert {data.name for data in first.data} & {data.name for data in second.data}  # shared weights


def test_finished_files_are_kept_and_those_of_another_release_are_not(compiled_om: Path, tmp_path: Path) -> None:
    directory = copied(compiled_om, tmp_path / "again")
    code, _, errors = simulated(directory, "--simulate")
    assert (code, errors.count("kept")) == (0, 2)
    code, _, errors = simulated(directory, "--simulate", "--cann", "9.1")
    assert (code, errors.count("done after")) == (0, 2)
    assert Manifest.load(directory).build["cann_version"] == "9.1"


def test_json_and_another_directory(compiled_om: Path, tmp_path: Path) -> None:
    code, output, errors = simulated(compiled_om, "--simulate", "-o", tmp_path / "out", "--json")
    assert code == 0, errors
    record = json.loads(output)
    assert record["simulated"] is True
    assert sorted(record["om"].values()) == ["decode_b4_t128.om", "prefill_s16_t128.om"]
    assert Manifest.load(tmp_path / "out").build["simulated"] is True


def test_a_folder_for_cann_knows_nothing_of_the_simulation(
    compiled_om: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("ASCEND_TOOLKIT_HOME", raising=False)
    code, _, errors = simulated(compiled_om, "-o", tmp_path / "folder")
    assert code == 3, errors
    manifest = Manifest.load(tmp_path / "folder")
    assert manifest.build == {}
    for entry in manifest.graphs:
        assert entry.file.name.endswith(".onnx")
        for file in (entry.file, *entry.data):
            check_file(tmp_path / "folder", file)
    assert list((tmp_path / "folder").glob("**/*.om")) == []


def test_a_single_graph(tmp_path: Path) -> None:
    path = saved(norm_model(), tmp_path, "norm.onnx")
    code, _, errors = simulated(path, "--simulate", "--soc-version", "Ascend910B4")
    assert code == 0, errors
    assert read_om(tmp_path / "norm.om").header.platform_version == "simulated"
    code, _, errors = simulated(path, "--soc-version", "Ascend910B4", "-o", tmp_path / "folder")
    assert code == 3  # a simulated file is never taken for a compiled one
    assert "--simulate tries it without" in errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--soc-version", "Ascend910B7"], "did you mean Ascend910B"),
        (["--soc-version", "Ascend910B"], "first-generation 910"),
        (["--", "--precision_mode_v2=fp16", "--precision_mode=force_fp16"], "exclude each other"),
        (["--", "--soc_version=Ascend910B4"], "--soc-version is an option of qcompile"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], words: str, tmp_path: Path) -> None:
    path = saved(norm_model(), tmp_path, "norm.onnx")
    given = arguments if "--soc-version" in arguments else ["--soc-version", "Ascend910B4", *arguments]
    code, _, errors = simulated(path, "--simulate", *given)
    assert code == 1
    assert words in errors
    assert list(tmp_path.rglob("*.om")) == []


def test_missing_external_data_and_illegal_graphs(compiled_om: Path, tmp_path: Path) -> None:
    directory = copied(compiled_om, tmp_path / "broken")
    (directory / "weights.data").unlink()
    code, _, errors = simulated(directory, "--simulate", "-o", tmp_path / "out")
    assert code == 1
    assert "is missing; copy it next to the model" in errors
    path = saved(changed(norm_model, renamed("NPURmsNorm", "NPUSwiGlu"))(), tmp_path, "swiglu.onnx")
    code, _, errors = simulated(path, "--simulate", "--soc-version", "Ascend910B4")
    assert code == 1
    assert "E16002" in errors
    code, _, errors = simulated(path, "--simulate", "--soc-version", "Ascend910B4", "--skip-check")
    assert code == 1
    assert "ATC failed with E16002 (exit code 255)" in errors
    assert list(tmp_path.glob("*.om")) == []


def test_a_full_disk_leaves_no_om(compiled_om: Path, tmp_path: Path) -> None:
    with file_size_limit(60_000):  # the graphs fit, the largest weight does not
        code, _, errors = simulated(compiled_om, "--simulate", "-o", tmp_path / "out")
    assert code == 1
    assert "cannot be written" in errors
    assert list(tmp_path.rglob("*.om")) == []


def test_the_stand_in_imports_nothing_from_the_model_directory(tmp_path: Path) -> None:
    """It is started in that directory, which belongs to a stranger."""
    saved(norm_model(), tmp_path, "norm.onnx")
    for name in ("qcompile", "numpy", "onnx"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('code of the model ran')")
    environ = dict(os.environ) | {"PYTHONPATH": str(Path(__file__).parents[2])}
    code = "from qcompile.cli.main import main; import sys; sys.argv = ['qcompile', *sys.argv[1:]]; main()"
    arguments = ["atc", str(tmp_path / "norm.onnx"), "--simulate", "--soc-version", "910b4"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environ, capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "norm.om").is_file()


def test_dynamic_w8a8_is_legal_where_its_operators_are_likely(tmp_path: Path) -> None:
    path = saved(dynamic_w8a8(), tmp_path, "q.onnx")
    code, _, errors = simulated(path, "--simulate", "--soc-version", "Ascend910B4")
    assert code == 0, errors
    assert "likely" in errors
