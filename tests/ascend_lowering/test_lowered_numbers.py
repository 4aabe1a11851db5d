"""The lowered graphs compute what the fused graph computes: run through their operators' definitions, in float16."""

from pathlib import Path

import numpy as np
import pytest

from qcompile.ascend.lowering import lower as lowering
from qcompile.export.export_checkpoint import export_checkpoint
from qcompile.runtime.errors import SessionError
from qcompile.verify import compare_directories
from tests.ascend_lowering.lowered import fuse_tiny, fused_logits, lower_tiny, reference_session
from tests.optimized import optimize_tiny
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


def biased_checkpoint(directory: Path, size: float) -> Path:
    """Write a tiny Qwen2 whose first layer has biases of `size` where rotation is slowest: 2 size^2 in every score."""
    write_tiny_checkpoint(directory)
    config = tiny_config()
    tensors = random_tensors(config)
    for name in ("q", "k"):
        bias = tensors[f"model.layers.0.self_attn.{name}_proj.bias"]
        bias.reshape(-1, 16)[:, [4, 5, 6, 7, 12, 13, 14, 15]] += size
    write_safetensors(directory / "model.safetensors", tensors, "float32")
    return directory


def test_centred_keys_keep_scores_of_large_biases_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores near a thousand are half a unit apart in float16; with centred keys the logits stay as they were."""
    export_checkpoint(str(biased_checkpoint(tmp_path / "checkpoint", 16.0)), tmp_path / "exported")
    optimize_tiny(tmp_path / "exported", tmp_path / "fused", target="portable")
    report = lower_tiny(tmp_path / "fused", tmp_path / "centred").ascend
    assert report["centred_layers"] == [0]
    assert report["largest_bias_score"] > 500
    centred = compare_directories(tmp_path / "fused", tmp_path / "centred", num_tokens=16)
    monkeypatch.setattr(lowering, "coarse_layers", lambda scores: frozenset())
    assert lower_tiny(tmp_path / "fused", tmp_path / "plain").ascend["centred_layers"] == []
    plain = compare_directories(tmp_path / "fused", tmp_path / "plain", num_tokens=16)
    assert centred.max_logit_difference < 0.2
    assert plain.max_logit_difference > 3 * centred.max_logit_difference
