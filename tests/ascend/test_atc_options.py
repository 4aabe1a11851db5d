"""The command line `qcompile atc` composes: the precision mode, exclusions, open dimensions, memory."""

import dataclasses
from pathlib import Path

import pytest

from qcompile.ascend.atc_jobs import Job, compile_settings, plan_build
from qcompile.ascend.atc_options import parse_extra_flags
from qcompile.ascend.chips import chip_named
from tests.ascend.faults import changed, input_dim
from tests.ascend.graphs import ascend_quant, attention_layer, dynamic_w8a8, norm_model, parsed, saved, weight_only
from tests.ascend.test_atc import CHIP, calls_of, run


def quantized_with_a_float32_norm():
    model = ascend_quant()
    model.graph.node.add(op_type="Cast", input=["x"], output=["wide"]).attribute.add(name="to", type="INT", i=1)
    model.graph.value_info.add(name="wide").type.tensor_type.elem_type = 1
    return model


@pytest.mark.parametrize(
    ("build", "flags"),
    [
        (norm_model, "--precision_mode=must_keep_origin_dtype"),
        (dynamic_w8a8, "--precision_mode=must_keep_origin_dtype"),
        (weight_only, "--precision_mode=must_keep_origin_dtype"),
        (attention_layer, "--precision_mode=must_keep_origin_dtype"),
        (ascend_quant, "--precision_mode=force_fp16"),
        (quantized_with_a_float32_norm, "--precision_mode=allow_fp32_to_fp16"),
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
        (["--precision_mode=force_fp16", "--precision_mode_v2=origin"], "E10047"),
        (["--precision_mode=fastest"], "E10001"),
        (["--precision_mode_v2=force_fp16"], "is not one of cube_fp16in_fp32out"),
        (["--log=loud"], "E10010"),
        (["--dynamic_batch_size=1,2", "--dynamic_dims=1;2"], "E10009"),
        (["--dynamic_dims=1;2", "--input_shape=x:1~4,8,64"], "E10040"),
        (["--dynamic_dims=1;2"], "E10012"),
        (["--input_shape=x:-1,8,64"], "open dimensions"),
        (["--input_shape=x:one"], "is not a size"),
        (["--soc_version=Ascend310P3"], "--soc-version is an option"),
        (["--model=other.onnx"], "qcompile sets it"),
        (["--host_env_cpu=aarch64"], "--host-cpu is an option of qcompile"),
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


def test_open_inputs_are_named_not_all_listed(tmp_path, cann):
    inputs = ", ".join(f"float16[n,8] x{i}" for i in range(9))
    body = "y = Sum (" + ", ".join(f"x{i}" for i in range(9)) + ")"
    result = run(saved(parsed(body, inputs, "float16[n,8] y"), tmp_path), *CHIP)
    assert result.exit_code == 1
    assert "(x0:-1,8; x1:-1,8; x2:-1,8 and 6 more inputs)" in str(result.exception)


def test_a_release_nobody_knows_warns(tmp_path, cann, monkeypatch):
    path = saved(norm_model(), tmp_path)
    assert "newer than the tables" in run(path, *CHIP, "--cann", "12.0", "--dry-run").stderr
    for info in (tmp_path / "system").rglob("ascend_toolkit_install.info"):
        info.write_text("version=next\n")
    result = run(path, *CHIP, "--dry-run")
    assert result.exit_code == 0
    assert "release of CANN is not known" in result.stderr


def test_a_quantized_graph_has_no_gears(tmp_path, cann):
    flags = ["--dynamic_dims=8;16", "--input_shape=x:-1,64"]
    assert "one .om per bucket" in str(run(saved(ascend_quant(), tmp_path), *CHIP, "--", *flags).exception)


def test_open_dimensions_need_buckets(tmp_path, cann):
    path = saved(changed(norm_model, input_dim(1, "sequence"))(), tmp_path)
    assert "lower it to buckets" in str(run(path, *CHIP).exception)
    assert run(path, *CHIP, "--", "--input_shape=x:1,8,64").exit_code == 0
    gears = run(path, *CHIP, "--", "--input_shape=x:1,-1,64", "--dynamic_dims=8;16")
    assert gears.exit_code == 0, gears.exception


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
