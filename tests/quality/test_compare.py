import json
import shutil

import numpy as np
import pytest

from qcompile.errors import QCompileError, QualityError
from qcompile.export.export_checkpoint import export_checkpoint
from qcompile.quality import models as quality_models
from qcompile.quality.compare import CompareOptions, compare_models
from qcompile.quality.record import histogram, record_of
from tests.export.tiny_gguf import gguf_config, write_gguf
from tests.optimized import export_tiny, optimize_tiny
from tests.quality.numpy_qwen import forward, kl_per_row, nll
from tests.tiny_checkpoints import (
    build_tokenizer,
    random_tensors,
    tiny_config,
    write_safetensors,
    write_tiny_checkpoint,
)

LAYERS = 3
QUICK = CompareOptions(greedy_tokens=0, num_tokens=200)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return export_tiny(tmp_path_factory.mktemp("tiny"), num_hidden_layers=LAYERS)


def perturbed(directory, name, scale=0.05):
    """Export the same model with noise on one weight; returns its directory and all its tensors."""
    config = tiny_config("qwen2", num_hidden_layers=LAYERS)
    tensors = random_tensors(config)
    noise = np.random.default_rng(9).standard_normal(tensors[name].shape).astype(np.float32)
    tensors[name] = tensors[name] + scale * np.abs(tensors[name]).mean() * noise
    checkpoint = write_tiny_checkpoint(directory / "perturbed-checkpoint", num_hidden_layers=LAYERS)
    write_safetensors(checkpoint / "model.safetensors", tensors, "float32")
    export_checkpoint(str(checkpoint), directory / "perturbed")
    return directory / "perturbed", tensors


def text_file(directory, num_tokens):
    """A file of token ids, and the ids."""
    ids = np.random.default_rng(5).integers(0, 400, num_tokens)
    path = directory / "ids.jsonl"
    path.write_text(json.dumps({"ids": ids.tolist()}), encoding="utf-8")
    return path, ids


def test_a_model_and_itself(tiny):
    report = compare_models(tiny, tiny, CompareOptions(num_tokens=300, greedy_tokens=12))
    assert report.overall.num_tokens == 300
    assert report.overall.mean_kl == report.overall.max_kl == 0.0
    assert report.overall.top1_agreement == 1.0
    assert report.overall.reference_perplexity == report.overall.other_perplexity
    assert report.layers.first_divergence is None
    assert len(report.layers.blocks) == 2 * LAYERS
    assert [(g.num_same, g.other_token) for g in report.greedy] == [(g.num_tokens, None) for g in report.greedy]
    assert len(report.greedy) == 4
    assert report.worst == []


@pytest.mark.parametrize(
    ("name", "layer", "part"),
    [
        ("model.layers.0.self_attn.k_proj.bias", 0, "attention"),
        ("model.layers.1.self_attn.o_proj.weight", 1, "attention"),
        ("model.layers.1.mlp.down_proj.weight", 1, "mlp"),
        ("model.layers.2.mlp.gate_proj.weight", 2, "mlp"),
    ],
)
def test_a_perturbed_layer_is_named_and_its_kl_is_right(tiny, tmp_path, name, layer, part):
    other, tensors = perturbed(tmp_path, name)
    data, ids = text_file(tmp_path, 90)
    config = tiny_config("qwen2", num_hidden_layers=LAYERS)
    a = forward(random_tensors(config), config, ids)[:-1]
    b = forward(tensors, config, ids)[:-1]
    report = compare_models(tiny, other, CompareOptions(data=data, greedy_tokens=0, chunk=32))
    kl = kl_per_row(a, b)
    assert report.overall.num_tokens == 89
    assert report.overall.mean_kl > 1e-7
    np.testing.assert_allclose(report.scores.kl, kl, rtol=0.02, atol=1e-8)
    assert report.overall.mean_kl == pytest.approx(kl.mean(), rel=1e-3)
    assert report.overall.p99_kl == pytest.approx(np.quantile(kl, 0.99), rel=1e-2)
    assert report.overall.reference_perplexity == pytest.approx(np.exp(nll(a, ids[1:]).mean()), rel=1e-4)
    assert report.overall.other_perplexity == pytest.approx(np.exp(nll(b, ids[1:]).mean()), rel=1e-4)
    assert report.overall.top1_agreement == pytest.approx((a.argmax(1) == b.argmax(1)).mean(), abs=0.02)
    first = report.layers.first_divergence
    assert (first.layer, first.part) == (layer, part)
    before = report.layers.blocks[: 2 * layer + (part == "mlp")]
    assert all(b.max_difference < 1e-5 for b in before)
    assert report.worst[0].kl == pytest.approx(kl.max(), rel=0.02)
    assert report.worst[0].position == int(kl.argmax()) + 1


def test_a_perturbed_head_differs_in_no_layer(tmp_path):
    """Untied head: the hidden states are the same, the answers are not."""
    one = export_tiny(tmp_path / "one", tie_word_embeddings=False)
    config = tiny_config("qwen2", tie_word_embeddings=False)
    tensors = random_tensors(config)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 1.1
    checkpoint = write_tiny_checkpoint(tmp_path / "two", tie_word_embeddings=False)
    write_safetensors(checkpoint / "model.safetensors", tensors, "float32")
    export_checkpoint(str(checkpoint), tmp_path / "two-fp32")
    report = compare_models(one, tmp_path / "two-fp32", QUICK)
    assert report.overall.mean_kl > 1e-3
    assert report.layers.first_divergence is None


def test_windows_give_the_perplexity_of_the_recipe(tiny, tmp_path):
    """A text of 150 tokens in windows of 40 every 16, against NumPy window by window."""
    data, ids = text_file(tmp_path, 150)
    config = tiny_config("qwen2", num_hidden_layers=LAYERS)
    tensors = random_tensors(config)
    losses, scored = [], 1
    for start in range(0, 150, 16):
        stop = min(start + 40, 150)
        logits = forward(tensors, config, ids[start:stop])
        losses.append(nll(logits[scored - 1 - start : stop - 1 - start], ids[scored:stop]))
        scored = stop
        if stop == 150:
            break
    wanted = np.exp(np.concatenate(losses).mean())
    options = CompareOptions(data=data, context=40, stride=16, chunk=7, greedy_tokens=0)
    report = compare_models(tiny, tiny, options)
    assert report.overall.num_tokens == 149
    assert report.overall.reference_perplexity == pytest.approx(wanted, rel=1e-4)


def test_across_targets_and_against_the_checkpoint(tiny, tmp_path):
    optimize_tiny(tiny, tmp_path / "ort")
    report = compare_models(tiny, tmp_path / "ort", CompareOptions(num_tokens=300, greedy_tokens=16))
    assert report.other["kv_cache"] == "shared"
    assert report.overall.mean_kl < 1e-9
    assert report.layers.first_divergence is None
    assert all(g.num_same == g.num_tokens for g in report.greedy)
    checkpoint = tiny.parent / "qwen2-checkpoint"
    report = compare_models(checkpoint, tmp_path / "ort", QUICK)
    assert report.overall.mean_kl < 1e-9
    assert report.notes[0].startswith("exported to fp32 in ")


def test_a_gguf_is_a_checkpoint_too(tmp_path):
    config = gguf_config("qwen2")
    write_gguf(tmp_path / "plain.gguf", config)
    write_gguf(tmp_path / "rough.gguf", config, kinds={"proj.weight": "Q8_0"})
    export_checkpoint(str(tmp_path / "plain.gguf"), tmp_path / "plain")
    assert compare_models(tmp_path / "plain.gguf", tmp_path / "plain", QUICK).overall.max_kl == 0.0
    assert 0 < compare_models(tmp_path / "plain", tmp_path / "rough.gguf", QUICK).overall.mean_kl < 0.05


def test_an_export_is_made_once_per_content(tiny, tmp_path, monkeypatch):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny.parent / "qwen2-checkpoint", checkpoint)
    exports = []
    export = quality_models.export_checkpoint
    monkeypatch.setattr(quality_models, "export_checkpoint", lambda *a, **k: (exports.append(a[0]), export(*a, **k))[1])
    first = quality_models.open_model(checkpoint)
    assert quality_models.open_model(checkpoint).graph_path == first.graph_path
    assert len(exports) == 1
    write_safetensors(
        checkpoint / "model.safetensors",
        random_tensors(tiny_config("qwen2", num_hidden_layers=LAYERS), seed=4),
        "float32",
    )
    assert quality_models.open_model(checkpoint).graph_path != first.graph_path
    assert len(exports) == 2


def test_quantized_weights_cost_something(tiny, tmp_path):
    optimize_tiny(tiny, tmp_path / "int8", "fuse", "int8")
    report = compare_models(tiny, tmp_path / "int8", QUICK)
    assert 1e-5 < report.overall.mean_kl < 0.1
    assert report.overall.median_kl <= report.overall.p99_kl <= report.overall.max_kl
    assert report.layers.first_divergence.layer == 0
    record = record_of(report)
    assert sum(record["kl_histogram"]["counts"]) == report.overall.num_tokens
    assert json.loads(json.dumps(record, allow_nan=False))["other"]["quantization"]


def test_a_rotated_model_is_compared_in_the_checkpoints_basis(tiny, tmp_path):
    """`int8` rotates the residual stream: with the manifest the layers still compare, without it the report says why not."""
    report = optimize_tiny(tiny, tmp_path / "rotated", "fuse", "rotate-residual")
    assert report.count("rotate-residual") == 1
    seen = compare_models(tiny, tmp_path / "rotated", QUICK)
    assert seen.overall.mean_kl < 1e-7
    assert len(seen.layers.blocks) == 2 * LAYERS
    assert seen.layers.first_divergence is None
    (tmp_path / "rotated" / "qcompile.json").unlink()
    seen = compare_models(tiny, tmp_path / "rotated", QUICK)
    assert seen.layers.blocks == ()
    assert seen.layers.reason == "the two carry their hidden states in different bases"


def test_greedy_answers_are_followed_to_the_first_difference(tiny, tmp_path):
    other = export_tiny(tmp_path, num_hidden_layers=LAYERS, rope_theta=3.0, rms_norm_eps=0.5)
    report = compare_models(tiny, other, CompareOptions(num_tokens=20, greedy_tokens=24))
    from qcompile.runtime import Engine, SamplingParams

    for agreement, prompt in zip(report.greedy, chat_prompts(tiny), strict=True):
        texts = []
        for path in (tiny, other):
            with Engine(path) as engine:
                params = SamplingParams(max_new_tokens=24)
                texts.append(engine.generate([prompt], params)[0].token_ids)
        same = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), len(texts[0]))
        assert (agreement.num_tokens, agreement.num_same) == (len(texts[0]), min(same, len(texts[0])))
        if agreement.num_same < agreement.num_tokens:
            assert (agreement.reference_token, agreement.other_token) == (texts[0][same], texts[1][same])
    assert any(g.num_same < g.num_tokens for g in report.greedy)


def chat_prompts(path):
    from qcompile.quality.documents import PROMPTS
    from qcompile.runtime import Engine

    with Engine(path) as engine:
        return [engine.encode_chat([{"role": "user", "content": text}]) for _, text in PROMPTS]


def test_own_prompts(tiny, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "def add(a, b):", "answer": "ignored", "group": "code"}\n', encoding="utf-8")
    report = compare_models(tiny, tiny, CompareOptions(num_tokens=10, prompts=path, greedy_tokens=5))
    assert [(g.group, g.num_same) for g in report.greedy] == [("code", 5)]
    wanted = len(build_tokenizer().encode("def add(a, b):").ids)
    assert report.greedy[0].num_prompt_tokens == wanted


@pytest.mark.parametrize(
    ("line", "message"),
    [('{"messages": [{"role": "user"}]}', "a.jsonl:1: message 0"), ('"\\ud800 and more"', "a.jsonl:1: .*UTF-8")],
)
def test_what_cannot_be_tokenized_is_named_with_its_line(tiny, tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(QualityError, match=message):
        compare_models(tiny, tiny, CompareOptions(data=path, greedy_tokens=0))


def test_a_prompt_longer_than_the_context(tiny, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"ids": [1] * 2040}), encoding="utf-8")
    with pytest.raises(QualityError, match="a prompt of 2040 tokens, room is for 2028 beside 20 written ones; shorten"):
        compare_models(tiny, tiny, CompareOptions(num_tokens=10, prompts=path, greedy_tokens=20))
    report = compare_models(tiny, tiny, CompareOptions(num_tokens=10, greedy_tokens=4096))
    assert any("room is for 0 beside 4096 written ones: prompts that do not fit" in note for note in report.notes)


def test_vocabularies_that_differ(tiny, tmp_path):
    other = export_tiny(tmp_path, vocab_size=520)
    with pytest.raises(QualityError, match=r"has a vocabulary of 520, .* of 512"):
        compare_models(tiny, other, QUICK)


def test_tokenizers_that_differ(tiny, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    (other / "qcompile.json").unlink()
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:10]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(QualityError, match="its tokenizer cuts built-in english into other tokens"):
        compare_models(tiny, other, QUICK)


def test_without_a_tokenizer_only_ids_will_do(tiny, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copy(tiny / name, bare / name)
    with pytest.raises(QualityError, match=r"no tokenizer\.json beside either model"):
        compare_models(bare / "model.onnx", bare, QUICK)
    data, _ = text_file(tmp_path, 30)
    assert compare_models(bare / "model.onnx", bare, CompareOptions(data=data)).overall.mean_kl == 0
    assert compare_models(bare, tiny, QUICK).overall.num_tokens == 200
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"ids": [1, 2, 3]}', encoding="utf-8")
    report = compare_models(bare, bare, CompareOptions(data=data, num_tokens=10, prompts=prompts, greedy_tokens=4))
    assert [(g.num_prompt_tokens, g.num_same) for g in report.greedy] == [(3, 4)]


def test_a_text_shorter_than_asked_is_noted(tiny, tmp_path):
    data, _ = text_file(tmp_path, 30)
    report = compare_models(tiny, tiny, CompareOptions(data=data, num_tokens=1000, greedy_tokens=0))
    assert report.overall.num_tokens == 29
    assert report.notes == [f"{data}: has 29 tokens to score, 1000 were asked for"]


def test_another_machines_model_is_refused(tiny, tmp_path):
    other = tmp_path / "npu"
    shutil.copytree(tiny, other)
    manifest = json.loads((other / "qcompile.json").read_text(encoding="utf-8"))
    manifest["target"] = "ascend910b4"
    (other / "qcompile.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(QualityError, match="compiled for ascend910b4, which ONNX Runtime does not run"):
        compare_models(tiny, other, QUICK)


def test_a_model_lowered_for_a_chip_is_run_by_its_definitions(tiny, tmp_path):
    """Static graphs in half precision: their answers are near, their layers not shown, and the report says how it ran."""
    from qcompile.ascend.buckets import BucketOptions
    from qcompile.ascend.lowering.lower import AscendOptions

    buckets = BucketOptions(batches=(1,), kv_lens=(64,), prefill_lens=(16,))
    optimize_tiny(tiny, tmp_path / "npu", target="ascend910b4", ascend=AscendOptions(buckets=buckets))
    data, _ = text_file(tmp_path, 40)
    report = compare_models(tiny, tmp_path / "npu", CompareOptions(data=data, greedy_tokens=8))
    assert report.text["context"] == 64
    assert any("prompts that do not fit are left out" in note for note in report.notes)
    assert report.other["kv_cache"] == "appended"
    assert report.overall.num_tokens == 39
    assert report.overall.mean_kl < 1e-3
    assert report.overall.top1_agreement > 0.9
    assert "fixed shapes" in report.layers.reason
    assert any("run token by token" in note for note in report.notes)


def test_a_truncated_model_is_refused(tiny, tmp_path):
    other = tmp_path / "cut"
    shutil.copytree(tiny, other)
    with (other / "model.onnx.data").open("r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(QCompileError, match="1000 bytes"):
        compare_models(tiny, other, QUICK)


def test_histogram_keeps_every_token():
    counted = histogram(np.array([0.0, 1e-9, 2e-8, 0.5, 1e3, np.inf]))
    assert sum(counted["counts"]) == 6
    assert counted["counts"][0] == 3
    assert counted["counts"][-1] == 2
    assert len(counted["edges"]) == len(counted["counts"]) + 1
