"""The whole path on the real Qwen2.5-Coder-0.5B-Instruct. Times are printed, never asserted.

The exported graph against transformers is in test_export_exactness.py; here it is what `optimize` makes of it.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qcompile.runtime import Engine, SamplingParams
from tests.real.real_model import (
    NUM_TOKENS,
    PROMPTS,
    Measured,
    Trace,
    qcompile,
)

pytestmark = pytest.mark.real
LAYERS = 24
FUSED = {"RmsNorm": 1, "AddRmsNorm": 2 * LAYERS, "Attention": LAYERS, "SwiGlu": LAYERS}
PASSES = {"fuse-qkv": LAYERS, "fuse-gate-up": LAYERS, "fuse-rotary-embedding": 2 * LAYERS}
# what norms, rotate-half, softmax attention and SwiGLU are made of
PRIMITIVES = {
    *("Pow", "ReduceMean", "Sqrt", "Reciprocal", "Div", "RMSNormalization", "Add"),
    *("Neg", "Slice", "RotaryEmbedding", "qcompile::RotaryEmbedding"),
    *("Softmax", "IsNaN", "Attention", "Sigmoid"),
}


def test_export_stays_within_a_gigabyte(exported: tuple[Path, Measured]) -> None:
    assert exported[1].peak_rss_bytes <= 1.0e9
    notes = " ".join(exported[1].record["notes"])
    assert "stored twice" in notes
    assert "Q8_0" in notes


def test_optimize_stays_within_one_and_a_half_gigabytes(fused: tuple[Path, Measured]) -> None:
    assert fused[1].peak_rss_bytes <= 1.5e9
    assert not fused[1].record["warnings"]
    assert sum(step["proved"] for step in fused[1].record["passes"]) >= 200


def check_agreement(what: str, seen: Trace, reference: Trace, limit: float) -> None:
    worst = float(np.abs(seen.logits - reference.logits).max())
    same = int((np.array(seen.tokens) == np.array(reference.tokens)).sum())
    print(f"\n{what}: max logit difference {worst:.2e}, {same} of {NUM_TOKENS} greedy tokens the same")
    assert seen.tokens == reference.tokens
    assert worst <= limit


@pytest.mark.parametrize("name", PROMPTS)
def test_fused_equals_transformers(name: str, fused_traces: dict[str, Trace], wanted: dict[str, Trace]) -> None:
    check_agreement(f"fused on ort, {name}", fused_traces[name], wanted[name], 2e-3)


def test_engine_batch_gives_the_same_tokens(
    fused: tuple[Path, Measured], prompts: dict[str, list[int]], wanted: dict[str, Trace]
) -> None:
    """Five prompts of different lengths as one batch, through the public API."""
    params = SamplingParams(max_new_tokens=NUM_TOKENS, ignore_eos=True)
    with Engine(fused[0]) as engine:
        completions = engine.generate(list(prompts.values()), params)
    for name, completion in zip(prompts, completions, strict=True):
        assert completion.token_ids == wanted[name].tokens, name


def test_int8_agrees_within_its_limits(
    work: Path, exported: tuple[Path, Measured], int8: tuple[Path, Measured]
) -> None:
    verified = qcompile(work, "verify-int8", "verify", exported[0], int8[0]).record
    print(f"\nint8: {json.dumps(verified)}")
    assert verified["quantized"]
    assert verified["holds"]
    assert int8[1].record["size_bytes"] < 0.6 * exported[1].record["size_bytes"]


def test_generate_answers_a_question(work: Path, int8: tuple[Path, Measured]) -> None:
    question = "What is 12 + 30? Answer with the number only."
    answer = qcompile(work, "generate", "generate", int8[0], question, "--max-new-tokens", "16").record
    assert "42" in answer["completions"][0]["text"]
    assert answer["completions"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("exporter", ["builder", "dynamo", "optimum"])
def test_fusion_counts(exporter: str, work: Path, exported: tuple[Path, Measured], checkpoint: Path) -> None:
    """Every chain of the 24-layer model is found in the graph of each exporter."""
    graph = exported[0] / "model.onnx" if exporter == "builder" else export_with(exporter, checkpoint, work)
    output = work / f"counts-{exporter}"
    arguments = ("--passes", "fuse", "--target", "portable", "--strict", "-o", output)
    report = qcompile(work, f"fuse-{exporter}", "optimize", graph, *arguments).record
    summary = qcompile(work, f"inspect-{exporter}", "inspect", output).record["models"][0]
    shutil.rmtree(output)
    if exporter != "builder":
        shutil.rmtree(graph.parent)
    print(f"\n{exporter}: {summary['fused']}, {len(report['ops_before'])} kinds of operators before")
    assert {op: summary["fused"].get(op, 0) for op in FUSED} == FUSED
    rewrites = {step["name"]: 0 for step in report["passes"]}
    for step in report["passes"]:
        rewrites[step["name"]] += step["rewrites"]
    assert {name: rewrites[name] for name in PASSES} == PASSES
    after = report["ops_after"]
    assert {op: after[op] for op in PRIMITIVES & after.keys()} == {}
    # one table of angles for the whole model is what is left of the rotary embedding
    assert after["Cos"] == after["Sin"] == 1
    assert all(after.get(op, 0) <= limit for op, limit in {"Mul": 3, "Expand": 1, "Where": 1}.items()), after
    assert after["MatMul"] + after.get("qcompile::Linear", 0) <= 4 * LAYERS + 3


def export_with(exporter: str, checkpoint: Path, work: Path) -> Path:
    """Export by torch or Optimum; the latter needs QCOMPILE_OPTIMUM_PYTHON, which `make test-real` sets."""
    if exporter == "optimum" and not os.environ.get("QCOMPILE_OPTIMUM_PYTHON"):
        pytest.skip("QCOMPILE_OPTIMUM_PYTHON is not set; `make test-real` makes its environment")
    script = Path(__file__).with_name("export_three.py")
    command = [sys.executable, str(script), str(checkpoint), str(work / "three"), "--only", exporter]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return work / "three" / exporter / "model.onnx"
