import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qcompile.artifact import load_model
from qcompile.errors import ArtifactError, GraphError, PassError, QCompileError, UnsupportedOpError, VerifyError
from qcompile.passes.base import op_histogram
from qcompile.passes.registry import GROUPS, PASSES, expand
from qcompile.pipeline import OptimizeOptions, optimize
from qcompile.runtime.manifest import Manifest
from qcompile.verify import compare_directories
from tests.optimized import export_tiny, optimize_tiny

PRIMITIVES = {"Pow", "ReduceMean", "Sqrt", "Reciprocal", "Softmax", "Sigmoid", "Neg", "Expand", "Slice", "Where"}


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def exported(request, tmp_path_factory):
    return export_tiny(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    return export_tiny(tmp_path_factory.mktemp("qwen2"))


def test_portable_fuses_everything_and_keeps_the_interface(exported, tmp_path):
    report = optimize_tiny(exported, tmp_path / "out", target="portable", strict=True)
    model = load_model(tmp_path / "out" / "model.onnx")
    ops = op_histogram(model)
    layers = Manifest.load(exported).model.num_hidden_layers
    assert ops["qcompile::AddRmsNorm"] == 2 * layers
    assert ops["qcompile::Attention"] == layers
    assert ops["qcompile::SwiGlu"] == layers
    assert report.count("fuse-qkv") == layers
    assert report.count("fuse-gate-up") == layers
    assert not PRIMITIVES & set(ops)
    before = load_model(exported / "model.onnx")
    assert [v.name for v in model.graph.inputs] == [v.name for v in before.graph.inputs]
    assert [v.name for v in model.graph.outputs] == [v.name for v in before.graph.outputs]
    assert compare_directories(exported, tmp_path / "out").holds(quantized=False)


def test_ort_agrees_with_the_exported_model(exported, tmp_path):
    optimize_tiny(exported, tmp_path / "out", target="ort", strict=True)
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.graph().io.kv_cache == "shared"
    assert manifest.graph().io.logits == "last"
    ops = op_histogram(load_model(tmp_path / "out" / "model.onnx"))
    assert ops["com.microsoft::GroupQueryAttention"] == manifest.model.num_hidden_layers
    assert not any(name.startswith("qcompile::") for name in ops)
    agreement = compare_directories(exported, tmp_path / "out")
    assert agreement.same_tokens == agreement.num_tokens
    assert agreement.max_logit_difference < 1e-4


def test_int8_runs_on_the_int8_kernel_and_agrees_within_its_limits(exported, tmp_path):
    report = optimize_tiny(exported, tmp_path / "out", "fuse", "int8")
    manifest = Manifest.load(tmp_path / "out")
    ops = op_histogram(load_model(tmp_path / "out" / "model.onnx"))
    layers = manifest.model.num_hidden_layers
    assert ops["com.microsoft::MatMulNBits"] == 2 * layers + 1
    assert ops["com.microsoft::MatMulIntegerToFloat"] == 2 * layers
    assert "ReduceMax" not in ops  # one step for all rows
    assert "Add" not in ops  # the bias of qkv is in the product
    tied = manifest.config["tie_word_embeddings"]
    assert ops.get("MatMul", 0) == (4 if tied else 0)  # the two small factors of the rotation, there and back
    assert len(manifest.quantization["tensors"]) == 4 * layers + 2
    assert report.size_bytes < sum(e.size_bytes for e in Manifest.load(exported).graph().data)
    agreement = compare_directories(exported, tmp_path / "out")
    assert 0 < agreement.mean_kl < 0.02
    assert agreement.max_logit_difference > 1e-5


def test_full_verification_is_recorded(qwen2, tmp_path):
    report = optimize_tiny(qwen2, tmp_path / "out", verify="full")
    assert report.agreement is not None
    assert Manifest.load(tmp_path / "out").verification["same_tokens"] == report.agreement.num_tokens


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_models_are_fused(tmp_path, dtype):
    source = export_tiny(tmp_path, "qwen2", dtype)
    report = optimize_tiny(source, tmp_path / "out", strict=True)
    assert report.target == ("ort" if dtype == "fp16" else "portable")
    if dtype == "fp16":
        assert compare_directories(source, tmp_path / "out").holds(quantized=False)


def test_bfloat16_is_refused_for_ort(tmp_path):
    source = export_tiny(tmp_path, "qwen2", "bf16")
    with pytest.raises(UnsupportedOpError, match="the model is BFLOAT16; target ort has kernels for"):
        optimize_tiny(source, tmp_path / "out", target="ort")


def test_dynamic_ntk_inside_its_first_context_is_a_table(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    source = export_tiny(tmp_path, "qwen2", rope_parameters=rope, max_position_embeddings=128)
    report = optimize_tiny(source, tmp_path / "out")
    lowered = next(r for r in report.results if r.name == "lower-attention-to-ort")
    assert lowered.detail["rotary"] == "inside the kernel, by tables"
    assert compare_directories(source, tmp_path / "out", num_tokens=8).holds(quantized=False)


def test_single_passes_groups_and_skip_select_in_running_order():
    assert expand(["fuse-add-rms-norm", "fuse-rms-norm"]) == ["fuse-rms-norm", "fuse-add-rms-norm"]
    assert set(expand(["fuse"])) == set(GROUPS["fuse"])
    assert expand(["int8", "fuse"]).index("rotate-residual") == len(GROUPS["fuse"])
    assert set(GROUPS["clean"]) <= set(PASSES)


def test_one_pass_alone(qwen2, tmp_path):
    optimize_tiny(qwen2, tmp_path / "out", "fuse-rms-norm", target="portable")
    ops = op_histogram(load_model(tmp_path / "out" / "model.onnx"))
    assert ops["qcompile::RmsNorm"] == 2 * Manifest.load(qwen2).model.num_hidden_layers + 1
    assert "qcompile::Attention" not in ops


def test_skipped_pass_does_not_run(qwen2, tmp_path):
    report = optimize_tiny(qwen2, tmp_path / "out", target="portable", skip=("fuse-attention",))
    assert not any(r.name == "fuse-attention" for r in report.results)
    assert any("fuse-qkv" in warning for warning in report.warnings)


def test_strict_refuses_when_a_fusion_cannot_fire(qwen2, tmp_path):
    with pytest.raises(VerifyError, match="--strict: fuse-qkv: 0 of 2 places"):
        optimize_tiny(qwen2, tmp_path / "out", skip=("fuse-attention",), strict=True)
    assert not (tmp_path / "out").exists()


def test_unknown_pass_suggests_the_nearest():
    with pytest.raises(PassError, match="unknown pass 'fuse-rmsnorm'; did you mean 'fuse-rms-norm'"):
        expand(["fuse-rmsnorm"])


def test_unknown_target_and_level(qwen2, tmp_path):
    with pytest.raises(UnsupportedOpError, match="unknown target 'orrt'; did you mean 'ort'"):
        optimize_tiny(qwen2, tmp_path / "out", target="orrt")
    with pytest.raises(PassError, match="wanted one of off, fast, full"):
        optimize_tiny(qwen2, tmp_path / "out", verify="slow")


def test_dry_run_writes_nothing(qwen2, tmp_path):
    report = optimize_tiny(qwen2, tmp_path / "out", dry_run=True)
    assert report.count("fuse-attention") == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("named", ["directory", "file", "link"])
def test_the_model_that_is_read_is_not_replaced(qwen2, tmp_path, named):
    source = Path(shutil.copytree(qwen2, tmp_path / "model"))
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    (tmp_path / "link").symlink_to(source)
    given = {
        "directory": (source, source),
        "file": (source / "model.onnx", source),
        "link": (source, tmp_path / "link"),
    }
    with pytest.raises(ArtifactError, match="holds the model that is read, which would be gone; choose another output"):
        optimize_tiny(*given[named])
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert optimize_tiny(source, source, dry_run=True).ops_after


def test_what_is_in_the_way_is_told_before_the_work(qwen2, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    said: list[str] = []
    with pytest.raises(ArtifactError, match="is not a compiled-model directory"):
        optimize(qwen2, tmp_path, OptimizeOptions(), lambda what, done, total: said.append(what))
    assert said == []


def test_verify_off_proves_nothing(qwen2, tmp_path):
    report = optimize_tiny(qwen2, tmp_path / "out", verify="off")
    assert all(r.proved == 0 for r in report.results)
    assert compare_directories(qwen2, tmp_path / "out").holds(quantized=False)


def test_surgery_runs_first_and_is_named_in_the_report(qwen2, tmp_path):
    script = tmp_path / "edit.py"
    script.write_text("def rename(graph):\n    graph.name = 'mine'\n    return graph\n")
    report = optimize_tiny(qwen2, tmp_path / "out", surgery=f"{script}:rename")
    assert load_model(tmp_path / "out" / "model.onnx").graph.name == "mine"
    assert any("surgery" in warning for warning in report.warnings)


def test_a_file_without_manifest_takes_what_lies_beside_it(qwen2, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(qwen2, plain)
    (plain / "qcompile.json").unlink()
    optimize(plain / "model.onnx", tmp_path / "out", OptimizeOptions())
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.model.num_hidden_layers == 2
    assert any(entry.name == "tokenizer.json" for entry in manifest.files)
    assert compare_directories(plain, tmp_path / "out").holds(quantized=False)


def test_the_passes_and_their_checks_are_in_the_manifest(qwen2, tmp_path):
    optimize_tiny(qwen2, tmp_path / "out")
    records = {record["name"]: record for record in Manifest.load(tmp_path / "out").passes}
    assert records["fuse-attention"]["rewrites"] == records["fuse-attention"]["proved"] == 2
    assert records["fuse-attention"]["max_error"] < 2e-5
    json.dumps(records)


def test_not_an_onnx_file(tmp_path):
    bad = tmp_path / "model.onnx"
    bad.write_bytes(b"this is no model")
    with pytest.raises(GraphError):
        optimize(bad, tmp_path / "out", OptimizeOptions())
    assert not (tmp_path / "out").exists()


def test_missing_weights(qwen2, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(qwen2, broken)
    (broken / "model.onnx.data").unlink()
    with pytest.raises(QCompileError, match=r"model\.onnx\.data"):
        optimize(broken, tmp_path / "out", OptimizeOptions())


def test_a_changed_weight_fails_the_comparison(qwen2, tmp_path):
    optimize_tiny(qwen2, tmp_path / "out")
    data = np.fromfile(tmp_path / "out" / "model.onnx.data", np.float32)
    data[: len(data) // 2] *= 1.5
    data.tofile(tmp_path / "out" / "model.onnx.data")
    agreement = compare_directories(qwen2, tmp_path / "out")
    assert not agreement.holds(quantized=False)
    assert agreement.max_logit_difference > 0.01


def test_models_of_different_vocabularies_are_not_compared(qwen2, tmp_path):
    other = export_tiny(tmp_path, "qwen3", vocab_size=Manifest.load(qwen2).model.vocab_size + 8)
    with pytest.raises(VerifyError, match="not one model"):
        compare_directories(qwen2, other)


def without_times(record):
    """The record of a run without what was measured and where it was written."""
    if isinstance(record, dict):
        return {
            key: without_times(value) for key, value in record.items() if key not in {"seconds", "loaded", "output"}
        }
    return [without_times(value) for value in record] if isinstance(record, list) else record


def test_same_bytes_and_report_whatever_the_hash_seed(qwen2, tmp_path):
    code = (
        "import json, sys; from pathlib import Path; from qcompile.pipeline import optimize, OptimizeOptions;"
        "report = optimize(Path(sys.argv[1]), Path(sys.argv[2]), OptimizeOptions(('fuse', 'int8')));"
        "print(json.dumps(report.record()))"
    )
    runs = []
    for seed in ("1", "2"):
        output = tmp_path / seed
        done = subprocess.run(
            [sys.executable, "-c", code, str(qwen2), str(output)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        )
        files = [(output / name).read_bytes() for name in ("model.onnx", "model.onnx.data")]
        manifest = json.loads((output / "qcompile.json").read_text(encoding="utf-8"))
        runs.append((files, without_times(json.loads(done.stdout)), without_times(manifest)))
    assert runs[0] == runs[1]
    assert runs[0][1]["passes"][0]["name"] == "inline-exporter-functions"


@pytest.mark.parametrize("graph", ["qwen2-dynamo-sdpa", "qwen3-optimum"])
def test_a_second_run_gives_the_same_bytes(tmp_path, graph):
    source = Path(__file__).parent / "data" / "graphs" / f"{graph}.onnx"
    reports = [optimize(source, tmp_path / name, OptimizeOptions()) for name in ("a", "b")]
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert without_times(reports[0].record()) == without_times(reports[1].record())
