"""`qcompile atc` with a stand-in for the compiler on PATH: command lines, resuming, failures, folders, manifest."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner

from qcompile.ascend.atc_jobs import Job, compile_settings, plan_build
from qcompile.ascend.atc_options import parse_extra_flags
from qcompile.ascend.chips import chip_named
from qcompile.cli.atc import command
from qcompile.errors import AtcError
from qcompile.runtime.manifest import Manifest, check_file
from tests.ascend.fake_cann import sourced, toolkit
from tests.ascend.faults import changed, input_dim, renamed
from tests.ascend.graphs import ascend_quant, attention_layer, dynamic_w8a8, norm_model, parsed, saved, weight_only
from tests.graphs_on_disk import file_size_limit

LOGS = Path(__file__).parents[1] / "data" / "atc_logs"
CHIP = ["--soc-version", "Ascend910B4"]


@pytest.fixture
def model(tmp_path):
    """A lowered directory: two graphs with shared weights, tokenizer, manifest."""
    directory = tmp_path / "model"
    directory.mkdir()
    entries = []
    for name, role in (("decode_b4_t1024", "decode"), ("prefill_s128_t1024", "prefill")):
        proto = norm_model()
        tensor = proto.graph.initializer[0]
        (directory / "weights.data").write_bytes(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="weights.data")
        saved(proto, directory, f"{name}.onnx")
        file = {"name": f"{name}.onnx", "size_bytes": 1, "sha256": ""}
        io = {"kv_cache": "appended", "logits": "chosen", "inputs": ["x"], "outputs": ["y"], "dtype": "float16"}
        entries.append({"role": role, "file": file, "data": [], "io": io})
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 99}}, "added_tokens": []}))
    shape = {"model_type": "qwen2", "vocab_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048}
    files = [{"name": "tokenizer.json", "size_bytes": 1, "sha256": ""}]
    record = {"schema_version": 1, "target": "ascend910b4", "model": shape, "graphs": entries, "files": files}
    (directory / "qcompile.json").write_text(json.dumps(record))
    return directory


@pytest.fixture
def cann(tmp_path, monkeypatch):
    """CANN 8.1 with the stand-in, its environment set in this process; returns what the stand-in was called with."""
    home = toolkit(tmp_path / "system")
    for name, value in sourced(home, tmp_path / "tools").items():
        monkeypatch.setenv(name, value)
    calls = tmp_path / "calls"
    calls.touch()
    monkeypatch.setenv("FAKE_ATC", "weights")
    monkeypatch.setenv("FAKE_ATC_CALLS", str(calls))
    monkeypatch.setenv("FAKE_ATC_LOG", str(LOGS / "EZ3003.log"))
    monkeypatch.delenv("TE_PARALLEL_COMPILER", raising=False)
    return calls


@pytest.fixture
def no_cann(tmp_path, monkeypatch):
    for name in ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH", "ASCEND_OPP_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setenv("HOME", str(tmp_path / "empty"))


def run(*arguments):
    return CliRunner().invoke(command, [str(a) for a in arguments])


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
        ("fail:all", "EZ3003"),
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


def test_the_folder_builds_where_cann_is(model, no_cann, tmp_path, monkeypatch):
    assert run(model, "--host-cpu", "aarch64").exit_code == 3
    folder = tmp_path / "moved"
    shutil.move(tmp_path / "model-for-atc", folder)
    home = toolkit(tmp_path / "system")
    tools = tmp_path / "tools"
    environ = sourced(home, tools) | {"FAKE_ATC": "weights", "FAKE_ATC_CALLS": str(tmp_path / "calls")}
    environ["FAKE_ATC_LOG"] = str(LOGS / "EZ3003.log")
    (tools / "python3").unlink()
    (tools / "python3").symlink_to(sys.executable)

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
    from tests.ascend.fake_cann import PYTHON_WITHOUT, script

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


@pytest.mark.parametrize(
    ("build", "flags"),
    [
        (norm_model, "--precision_mode=must_keep_origin_dtype"),
        (dynamic_w8a8, "--precision_mode=must_keep_origin_dtype"),
        (weight_only, "--precision_mode=must_keep_origin_dtype"),
        (attention_layer, "--precision_mode=must_keep_origin_dtype"),
        (ascend_quant, "--precision_mode=force_fp16"),
        (lambda: parsed("y = Add (x, x)", "float[1,2] x", "float[1,2] y"), "--precision_mode=allow_fp32_to_fp16"),
        (lambda: parsed("y = Add (x, s)", "float16[1,2] x, float16 s", "float16[1,2] y"), "--input_shape=x:1,2;s:"),
    ],
)
def test_the_precision_mode_fits_the_graph(build, flags, tmp_path):
    (job,) = plan_build(saved(build(), tmp_path), chip_named("910b4"), {}).jobs
    assert flags in job.arguments


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--precision_mode=force_fp16", "--precision_mode_v2=origin"], "E10055"),
        (["--precision_mode=fastest"], "E10001"),
        (["--log=loud"], "E10010"),
        (["--dynamic_batch_size=1,2", "--dynamic_dims=1;2"], "E10009"),
        (["--dynamic_dims=1;2", "--input_shape=x:1~4,8,64"], "E10040"),
        (["--dynamic_dims=1;2"], "E10012"),
        (["--input_shape=x:-1,8,64"], "open dimensions"),
        (["--input_shape=x:one"], "is not a size"),
        (["--soc_version=Ascend310P3"], "--soc-version is an option"),
        (["--model=other.onnx"], "qcompile sets it"),
        (["--log"], "has no value"),
        (["fast"], "no flag of ATC"),
        (["--log=info", "--log=debug"], "given twice"),
        (["--external_weight=2"], "0 and 1 only"),
    ],
)
def test_flags_that_exclude_each_other(flags, words, tmp_path, cann):
    result = run(saved(norm_model(), tmp_path), *CHIP, "--", *flags)
    assert result.exit_code == 1
    assert words in str(result.exception)
    assert calls_of(cann) == []


def test_a_quantized_graph_has_no_gears(tmp_path, cann):
    flags = ["--dynamic_dims=8;16", "--input_shape=x:-1,64"]
    assert "one .om per bucket" in str(run(saved(ascend_quant(), tmp_path), *CHIP, "--", *flags).exception)


def test_open_dimensions_need_buckets(tmp_path, cann):
    path = saved(changed(norm_model, input_dim(1, "sequence"))(), tmp_path)
    assert "lower it to buckets" in str(run(path, *CHIP).exception)
    assert run(path, *CHIP, "--", "--input_shape=x:1,8,64").exit_code == 0
    gears = run(path, *CHIP, "--", "--input_shape=x:1,-1,64", "--dynamic_dims=8;16")
    assert gears.exit_code == 0, gears.exception


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


def job_of(memory_gib: int) -> Job:
    empty = Job("n", Path(), "g", (), (), "", 0, 0, 0)
    return dataclasses.replace(empty, memory_bytes=memory_gib << 30)


@pytest.mark.parametrize(
    ("free_gib", "cpus", "expected"),
    [(8, 4, (1, 1)), (64, 16, (4, 4)), (64, 2, (1, 2)), (16, 16, (1, 5)), (1, 8, (1, 1)), (None, 64, (1, 8))],
)
def test_parallel_only_if_memory_allows(free_gib, cpus, expected):
    jobs = [job_of(8)] * 4
    at_once, workers = compile_settings(jobs, None if free_gib is None else free_gib << 30, cpus)
    assert (at_once, workers) == expected
    if free_gib is not None and free_gib >= 16:
        assert at_once * ((8 << 30) + workers * (3 << 29)) <= free_gib << 30


def test_flags_may_be_written_with_a_space():
    assert parse_extra_flags(["--log", "info", "-oo_level=O1"]) == {"log": "info", "oo_level": "O1"}
