"""The lowered graphs compute what the fused graph computes: run through their operators' definitions, in float16."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from qcompile.ascend.lowering.attention import Heads, StepInputs, attend
from qcompile.ascend.lowering.static_graph import StaticGraph
from qcompile.ascend.reference import reference_model
from qcompile.export.export_checkpoint import export_checkpoint
from qcompile.runtime.errors import SessionError
from qcompile.verify import compare_directories
from tests.ascend_lowering.lowered import BUCKETS, AscendOptions, fuse_tiny, fused_logits, lower_tiny, reference_session
from tests.optimized import export_tiny, optimize_tiny
from tests.tiny_checkpoints import random_tensors, tiny_config, write_safetensors, write_tiny_checkpoint

MODELS = {
    "qwen2": ("qwen2", {}),
    "qwen2 untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen2 one kv head": ("qwen2", {"num_key_value_heads": 1}),
    "qwen2 no groups": ("qwen2", {"num_key_value_heads": 4}),
    "qwen2 epsilon": ("qwen2", {"rms_norm_eps": 1e-5}),
    "qwen2 yarn": (
        "qwen2",
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3 with biases": ("qwen3", {"attention_bias": True}),
}
PROMPTS = [[5, 80, 31], list(range(40, 61)), [7] * 17, [300]]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("target", ["ascend910b4", "ascend310b4"])
def test_same_tokens_as_the_fused_graph(name: str, target: str, tmp_path: Path) -> None:
    model_type, overrides = MODELS[name]
    fused = fuse_tiny(tmp_path, model_type, **overrides)
    lower_tiny(fused, tmp_path / "out", target)
    agreement = compare_directories(fused, tmp_path / "out", num_tokens=24)
    assert agreement.mean_kl < 1e-5
    assert agreement.same_tokens >= agreement.num_tokens - 1  # float16 may break a tie
    assert agreement.max_logit_difference < 0.05


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_model_exported_in_bfloat16(dtype: str, tmp_path: Path) -> None:
    """ONNX Runtime cannot run the source itself; the same weights in float32 are what it is compared with."""
    source = export_tiny(tmp_path, dtype="bf16")
    report = optimize_tiny(source, tmp_path / "out", target="ascend910b4", ascend=AscendOptions(BUCKETS, dtype))
    assert not report.warnings
    agreement = compare_directories(fuse_tiny(tmp_path), tmp_path / "out", num_tokens=12)
    assert agreement.mean_kl < 1e-3
    assert agreement.same_tokens >= agreement.num_tokens - 3


def test_rows_of_different_lengths_in_one_batch(tmp_path: Path) -> None:
    """Each row is as if it were alone; a prompt longer than a chunk is prefilled in several."""
    fused = fuse_tiny(tmp_path)
    lower_tiny(fused, tmp_path / "out")
    wanted, logits = fused_logits(fused, PROMPTS, 8)
    session = reference_session(tmp_path / "out")
    session.reserve(len(PROMPTS), 64)
    lengths = []
    for slot, prompt in enumerate(PROMPTS):
        for start in range(0, len(prompt), session.max_chunk):
            chunk = prompt[start : start + session.max_chunk]
            scores = session.forward(slot, np.array([chunk], np.int64), [start])
        assert scores is not None
        assert int(scores.values[0].argmax()) == wanted[slot][0]
        lengths.append(len(prompt))
    for step in range(7):
        ids = np.array([[tokens[step]] for tokens in wanted], np.int64)
        scores = session.forward(0, ids, lengths)
        assert scores is not None
        assert np.abs(scores.values - logits[:, step + 1]).max() < 0.05
        lengths = [length + 1 for length in lengths]
    session.close()


def test_cached_rows_beyond_the_length_do_not_matter(tmp_path: Path) -> None:
    fused = fuse_tiny(tmp_path)
    lower_tiny(fused, tmp_path / "out")
    session = reference_session(tmp_path / "out")
    session.reserve(1, 64)
    session.forward(0, np.array([[5, 6, 7]], np.int64), [0])
    clean = session.forward(0, np.array([[8]], np.int64), [3])
    for buffer in session._cache.values():
        buffer[:, :, 4:] = 1000.0
    dirty = session.forward(0, np.array([[8]], np.int64), [3])
    session.close()
    assert clean is not None
    assert dirty is not None
    np.testing.assert_array_equal(clean.values, dirty.values)


def test_a_full_cache_is_refused(tmp_path: Path) -> None:
    fused = fuse_tiny(tmp_path)
    lower_tiny(fused, tmp_path / "out")
    session = reference_session(tmp_path / "out")
    session.reserve(1, 100)
    assert session.capacity == 128
    with pytest.raises(SessionError, match="the largest compiled is 128"):
        session.reserve(1, 129)
    session.close()


def attention_error(*, centred: bool, bias: float) -> float:
    """Return the largest error of one decode attention in float16 whose keys and query hold a common bias.

    Everything is rounded to float16 first, so the error is that of the scores alone.
    """
    rng = np.random.default_rng(0)
    heads, total, head = Heads(4, 2, 16), 32, 16
    half = np.float16
    q, k, past_k = (rng.standard_normal(shape) for shape in ((1, 1, 4, head), (1, 1, 2, head), (1, 2, total, head)))
    for array in (q, k, past_k):
        array[..., :8] = bias
    v, past_v = rng.standard_normal((1, 1, 2, head)), rng.standard_normal((1, 2, total, head))
    arrays = {"q": q / 4, "k": k, "v": v, "past_k": past_k, "past_v": past_v}
    arrays = {name: array.astype(half) for name, array in arrays.items()}
    graph = StaticGraph("attention")
    inputs = {n: graph.input(n, ir.DataType.FLOAT16, array.shape) for n, array in arrays.items()}
    mask = graph.constant("mask", np.zeros((1, 1, 1, total + 1), half))
    step = StepInputs(mask, mask, mask)
    rows, cache = (inputs["q"], inputs["k"], inputs["v"]), (inputs["past_k"], inputs["past_v"])
    y, _, _ = attend(graph, rows, cache, step, heads, centred=centred, name="attention")
    graph.output(y, "y")
    model = ir.to_proto(reference_model(graph.model())).SerializeToString()
    feeds = {name: array.astype(np.float32) for name, array in arrays.items()}
    seen = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(["y"], feeds)[0]

    exact = {name: array.astype(np.float64) for name, array in arrays.items()}
    keys = np.concatenate([exact["past_k"], exact["k"].transpose(0, 2, 1, 3)], axis=2)
    values = np.concatenate([exact["past_v"], exact["v"].transpose(0, 2, 1, 3)], axis=2)
    scores = exact["q"].reshape(1, 2, 2, head) @ keys.transpose(0, 1, 3, 2)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    wanted = (weights / weights.sum(axis=-1, keepdims=True)) @ values
    return float(np.abs(seen.reshape(wanted.shape) - wanted).max())


def test_centred_keys_keep_scores_of_large_biases_exact() -> None:
    """Scores near a thousand are half a unit apart in float16; with centred keys they are as good as small ones."""
    small = attention_error(centred=False, bias=0.0)
    assert attention_error(centred=True, bias=0.0) < 3 * small
    assert attention_error(centred=True, bias=16.0) < 20 * small
    assert attention_error(centred=False, bias=16.0) > 5 * attention_error(centred=True, bias=16.0)


def test_layers_with_large_biases_are_centred(tmp_path: Path) -> None:
    """The first layer's biases make scores of 16^2 * 16 / 4, the second's do not."""
    write_tiny_checkpoint(tmp_path / "checkpoint")
    tensors = random_tensors(tiny_config())
    for name in ("q", "k"):
        tensors[f"model.layers.0.self_attn.{name}_proj.bias"][:] += 16.0
    write_safetensors(tmp_path / "checkpoint" / "model.safetensors", tensors, "float32")
    export_checkpoint(str(tmp_path / "checkpoint"), tmp_path / "exported")
    optimize_tiny(tmp_path / "exported", tmp_path / "fused", target="portable")
    report = lower_tiny(tmp_path / "fused", tmp_path / "out").ascend
    assert report["centred_layers"] == [0]
    assert 1000 < report["largest_bias_score"] < 1100
    agreement = compare_directories(tmp_path / "fused", tmp_path / "out", num_tokens=16)
    assert agreement.same_tokens >= agreement.num_tokens - 1
