"""`qcompile atc` with a stand-in for the compiler on PATH: command lines, resuming, failures, folders, manifest."""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from qcompile.ascend import atc_manifest
from qcompile.cli.atc import command
from qcompile.errors import AtcError
from qcompile.runtime.manifest import Manifest, check_file
from tests.ascend.fake_cann import PYTHON_WITHOUT, script, sourced, toolkit
from tests.ascend.faults import changed, input_dim, renamed
from tests.ascend.graphs import dynamic_w8a8, norm_model, parsed, saved
from tests.graphs_on_disk import file_size_limit

LOGS = Path(__file__).parents[1] / "data" / "atc_logs"
CHIP = ["--soc-version", "Ascend910B4"]


def run(*arguments):
    return CliRunner().invoke(command, [str(a) for a in arguments])


def machine_with_cann(tmp_path):
    """The environment in which a prepared folder is built: a compiler that also writes weights, this Python."""
    home = toolkit(tmp_path / "system")
    tools = tmp_path / "tools"
    environ = sourced(home, tools) | {"FAKE_ATC": "weights", "FAKE_ATC_CALLS": str(tmp_path / "calls")}
    environ["FAKE_ATC_LOG"] = str(LOGS / "EZ3003.log")
    (tools / "python3").unlink()
    (tools / "python3").symlink_to(sys.executable)
    return environ


def calls_of(file):
    return [line for line in file.read_text().splitlines() if not line.startswith("env ")]


def test_every_graph_becomes_an_om_and_the_manifest_lists_it(model, cann):
    result = run(model)
    assert result.exit_code == 0, result.output
    manifest = Manifest.load(model)
    assert [(entry.role, entry.file.name) for entry in manifest.graphs] == [
        ("decode", "decode_b4_t1024.om"),
        ("prefill", "prefill_s128_t1024.om"),
    ]
    assert manifest.build == {"soc_version": "Ascend910B4", "cann_version": "8.1.RC1", "host_cpu": "x86_64"} | {
        "host_cpu": manifest.build["host_cpu"]
    }
    for entry in manifest.graphs:
        check_file(model, entry.file)
        assert [data.name for data in entry.data] == ["weight/weight_ab12"]
        assert check_file(model, entry.data[0]).read_text() == "same"
        assert entry.io.logits == "chosen"
    assert (model / "decode_b4_t1024.om").read_text() == "IMOD Ascend910B4 decode_b4_t1024"
    assert (model / "atc_build/decode_b4_t1024/atc.log").read_text().startswith("ATC start working")


def test_the_command_line(model, cann):
    run(model, "--host-cpu", "aarch64", "--", "--log=debug", "--op_select_implmode", "high_precision")
    line = calls_of(cann)[0]
    for flag in (
        "--mode=0 --framework=5 --model=decode_b4_t1024.onnx",
        "--output=atc_build/decode_b4_t1024/decode_b4_t1024",
        "--soc_version=Ascend910B4 --input_format=ND --input_shape=x:1,8,64",
        "--precision_mode=must_keep_origin_dtype --external_weight=1",
        "--host_env_os=linux --host_env_cpu=aarch64 --log=debug --op_select_implmode=high_precision",
    ):
        assert flag in line
    assert "TE_PARALLEL_COMPILER=" in cann.read_text()
    assert "TE_PARALLEL_COMPILER= " not in cann.read_text()


def test_a_dry_run_prints_and_does_nothing(model, cann):
    before = sorted(model.iterdir())
    result = run(model, "--dry-run")
    assert result.exit_code == 0
    lines = [line for line in result.stdout.splitlines() if line.startswith("atc ")]
    assert len(lines) == 2
    assert "'--input_shape=x:1,8,64'" in lines[0] or "--input_shape=x:1,8,64" in lines[0]
    assert calls_of(cann) == []
    assert sorted(model.iterdir()) == before
    record = json.loads(run(model, "--dry-run", "--json").stdout)
    assert record["jobs"][0]["argv"][0] == "atc"
    run(model)
    assert calls_of(cann)[0] in {" ".join(job["argv"][1:]) for job in record["jobs"]}


def test_finished_graphs_are_not_built_again(model, cann, monkeypatch):
    assert run(model).exit_code == 0
    assert run(model).exit_code == 0
    assert len(calls_of(cann)) == 2
    (model / "decode_b4_t1024.om").unlink()
    assert run(model).exit_code == 0
    assert len(calls_of(cann)) == 3
    saved(changed(norm_model, input_dim(1, 9))(), model, "prefill_s128_t1024.onnx")
    assert run(model).exit_code == 0
    assert len(calls_of(cann)) == 4
    assert run(model, "--", "--log=info").exit_code == 0
    assert len(calls_of(cann)) == 6


def test_what_was_finished_survives_a_failure(model, cann, monkeypatch):
    monkeypatch.setenv("FAKE_ATC", "fail:prefill")
    result = run(model)
    assert result.exit_code == 1
    assert isinstance(result.exception, AtcError)
    assert "prefill_s128_t1024: ATC failed with EZ3003" in str(result.exception)
    assert "layers.0.input_norm" in str(result.exception)
    assert "atc.log" in str(result.exception)
    assert Manifest.load(model).graphs[0].file.name.endswith(".onnx")
    assert (model / "decode_b4_t1024.om").is_file()
    monkeypatch.setenv("FAKE_ATC", "ok")
    assert run(model).exit_code == 0
    assert sum("decode_b4" in line for line in calls_of(cann)) == 1


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ("killed", "ran out of memory.*MAX_COMPILE_CORE_NUMBER=1"),
        ("silent", "without its success line"),
        ("nofile", "reported success, but.*0 .om files"),
        ("noom", r"reported success, but.*2 bytes that start with b'x\\n'; an .om file starts with b'IMOD'"),
        ("fail:all", "EZ3003.*; seen: EZ3003: .*; log: "),
    ],
)
def test_a_failure_leaves_no_om(behaviour, words, model, cann, monkeypatch):
    monkeypatch.setenv("FAKE_ATC", behaviour)
    result = run(model)
    assert result.exit_code == 1
    assert result.exception is not None
    with pytest.raises(AtcError, match=words):
        raise result.exception
    assert list(model.rglob("*.om")) == []


def test_the_name_with_the_host_in_it_is_taken(model, cann, monkeypatch):
    monkeypatch.setenv("FAKE_ATC", "linux")
    assert run(model).exit_code == 0
    assert Manifest.load(model).graph("decode").file.name == "decode_b4_t1024_linux_aarch64.om"


def test_a_single_graph_needs_no_manifest(tmp_path, cann):
    path = saved(norm_model(), tmp_path, "norm.onnx")
    result = run(path, *CHIP, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["om"] == {"norm": "norm.om"}
    assert (tmp_path / "norm.om").is_file()
    assert "--external_weight=0" in calls_of(cann)[0]


def test_another_output_directory(model, cann, tmp_path):
    result = run(model, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert Manifest.load(tmp_path / "out").graph("decode").file.name == "decode_b4_t1024.om"
    assert (tmp_path / "out/tokenizer.json").is_file()
    assert Manifest.load(model).graph("decode").file.name == "decode_b4_t1024.onnx"
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/precious").touch()
    assert "is in the way" in str(run(model, "-o", tmp_path / "taken").exception)


def test_without_cann_there_is_a_folder_and_exit_code_3(model, no_cann, tmp_path):
    result = run(model, "--host-cpu", "aarch64")
    assert result.exit_code == 3, result.output
    assert result.stdout.count("atc --mode=0") == 2
    folder = tmp_path / "model-for-atc"
    names = {path.name for path in folder.iterdir()}
    assert names == {"build_om.sh", "finish_manifest.py", "qcompile.json", "tokenizer.json", "weights.data"} | {
        "decode_b4_t1024.onnx",
        "prefill_s128_t1024.onnx",
    }
    assert list(tmp_path.rglob("*.om")) == []
    assert run(model).exit_code == 3  # a folder of ours is replaced
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "precious").touch()
    refused = run(model)
    assert refused.exit_code == 1
    assert "is in the way" in str(refused.exception)


@pytest.mark.parametrize("name", ["f[red]", "f[/b]"])
def test_brackets_in_a_folder_are_no_markup(name, model, no_cann, tmp_path):
    result = run(model, "-o", tmp_path / name)
    assert result.exit_code == 3, result.output
    assert f"Copy {tmp_path / name} to a machine" in result.stderr


def test_the_folder_compiles_for_the_machine_that_builds_it(model, no_cann, tmp_path):
    script = tmp_path / "model-for-atc" / "build_om.sh"
    assert run(model).exit_code == 3
    text = script.read_text()
    assert 'host_cpu="$(uname -m)"' in text
    assert text.count(' --host_env_cpu="$host_cpu"') == 2
    assert run(model, "--host-cpu", "aarch64").exit_code == 3
    assert "host_cpu=aarch64" in script.read_text()


def test_the_folder_builds_where_cann_is(model, no_cann, tmp_path, monkeypatch):
    assert run(model, "--host-cpu", "aarch64").exit_code == 3
    folder = tmp_path / "moved"
    shutil.move(tmp_path / "model-for-atc", folder)
    environ = machine_with_cann(tmp_path)

    def build(**more):
        done = subprocess.run(["/bin/bash", folder / "build_om.sh"], env=environ | more, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    assert build(FAKE_ATC="fail:prefill")[0] == 1
    code, output = build()
    assert code == 0, output
    assert "decode_b4_t1024: finished before, kept" in output
    manifest = Manifest.load(folder)
    assert [entry.file.name for entry in manifest.graphs] == ["decode_b4_t1024.om", "prefill_s128_t1024.om"]
    assert manifest.build == {"soc_version": "Ascend910B4", "host_cpu": "aarch64"}
    check_file(folder, manifest.graphs[1].data[0])
    assert build(PATH=str(tmp_path / "empty"), HOME=str(tmp_path), ASCEND_TOOLKIT_HOME="")[0] != 0


def test_a_full_disk_leaves_no_folder(model, no_cann, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    with (model / "weights.data").open("ab") as stream:
        stream.truncate(1 << 20)
    with file_size_limit(1 << 16):
        result = run(model)
    assert "nothing half-written is left" in str(result.exception)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["model"]


def test_cann_that_was_not_sourced(model, tmp_path, no_cann, monkeypatch):
    home = toolkit(tmp_path / "system")
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", str(home))
    result = run(model)
    assert result.exit_code == 1
    assert f"source {home.parent / 'set_env.sh'}" in str(result.exception)


def test_missing_packages_and_driver_are_said(model, cann, tmp_path):
    script(tmp_path / "tools/python3", PYTHON_WITHOUT)
    result = run(model)
    assert result.exit_code == 0
    assert "pip install decorator absl-py" in result.stderr
    assert "devlib" in result.stderr


def test_an_interrupted_run_ends_the_compilers(model, cann, monkeypatch, tmp_path):
    """Ctrl-C in a real process: no stand-in is left running, no .om, and the next run goes on."""
    environ = dict(os.environ) | {"FAKE_ATC": "slow", "PYTHONPATH": str(Path(__file__).parents[2])}
    code = f"from qcompile.cli.main import main; import sys; sys.argv = ['qcompile', 'atc', {str(model)!r}]; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environ, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    deadline = time.monotonic() + 20
    while not calls_of(cann) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b"interrupted" in errors
    assert list(model.rglob("*.om")) == []
    monkeypatch.setenv("FAKE_ATC", "ok")
    assert run(model).exit_code == 0


def test_what_the_check_refuses_is_not_compiled(tmp_path, cann):
    path = saved(changed(norm_model, renamed("NPURmsNorm", "NPUSwiGlu"))(), tmp_path)
    result = run(path, *CHIP)
    assert result.exit_code == 1
    assert "E16002" in str(result.exception)
    assert "Sigmoid" in str(result.exception)
    assert calls_of(cann) == []
    assert run(path, *CHIP, "--skip-check").exit_code == 0


def test_a_graph_is_compiled_for_the_target_of_its_manifest(model, no_cann):
    result = run(model / "decode_b4_t1024.onnx", "--dry-run")
    assert result.exit_code == 0, result.exception
    assert "--soc_version=Ascend910B4 " in result.stdout


def test_a_file_that_is_not_there_is_missed_before_the_chip(tmp_path, no_cann):
    assert str(run(tmp_path / "nothere", "--dry-run").exception) == f"{tmp_path / 'nothere'}: no such file or directory"


def test_the_chip_must_be_known(tmp_path, cann):
    path = saved(norm_model(), tmp_path)
    assert "which chip?" in str(run(path).exception)
    assert "did you mean Ascend910B4" in str(run(path, "--soc-version", "Ascend910B7").exception)


def test_a_tokenizer_larger_than_the_vocabulary(model, cann):
    (model / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 100}]}))
    assert "token 100 does not exist" in str(run(model).exception)


def test_buckets_that_do_not_fit_the_chip(tmp_path, cann):
    shape = "4,2048,4096,4096"
    path = saved(parsed("y = Identity (x)", f"float16[{shape}] x", f"float16[{shape}] y"), tmp_path)
    assert "do not fit" in str(run(path, *CHIP).exception)


def test_missing_weights_are_one_line(model, cann):
    (model / "weights.data").unlink()
    result = run(model)
    assert result.exit_code == 1
    assert "is missing" in str(result.exception)


def test_the_script_beside_build_om_needs_python_3_7_only():
    source = Path(atc_manifest.__file__).read_text(encoding="utf-8")
    tree = ast.parse(source, feature_version=(3, 7))
    imported = {
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert imported <= {"__future__", "hashlib", "json", "os", "sys", "typing", "collections.abc"}
    methods = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not methods & {"removeprefix", "removesuffix", "is_relative_to", "readlink"}


def test_what_the_installed_parsers_lack_is_not_compiled(tmp_path, cann):
    path = saved(dynamic_w8a8(), tmp_path)
    result = run(path, *CHIP)
    assert result.exit_code == 1
    assert "op-not-installed" in str(result.exception)
    library = tmp_path / "system/usr/local/Ascend/ascend-toolkit/latest/opp/built-in/framework/onnx/libmore.so"
    library.write_bytes(b"ai.onnx::16::NPUDynamicQuant\0")
    result = run(path, *CHIP)
    assert result.exit_code == 0, result.exception
    assert "likely" not in result.stderr  # the scan settled it


def test_a_bare_atc_on_path_is_enough(model, no_cann, tmp_path, monkeypatch):
    """Neither a home nor set_env.sh: the compiler is used, and what is not known is said."""
    atc = '#!/bin/sh\nfor w in "$@"; do case $w in --output=*) echo IMOD > ${w#--output=}.om;; esac; done\n'
    script(tmp_path / "bare/atc", atc + "echo 'ATC run success, welcome to the next use.'\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bare'}:/usr/bin:/bin")
    result = run(model)
    assert result.exit_code == 0, result.exception
    assert "release of CANN is not known" in result.stderr
    assert Manifest.load(model).graph("prefill").file.name == "prefill_s128_t1024.om"
