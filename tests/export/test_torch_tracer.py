"""The torch tracer: the builder's interface and numbers, and what is said when it cannot run."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qcompile.artifact import load_model
from qcompile.errors import ExportError
from qcompile.export import torch_tracer
from qcompile.export.export_checkpoint import export_checkpoint
from qcompile.export.gguf_source import open_gguf
from qcompile.export.torch_tracer import trace_checkpoint
from qcompile.model_config import ModelConfig
from tests.export.onnx_decoder import OnnxDecoder, TorchDecoder, steps_of
from tests.export.tiny_gguf import gguf_config, write_gguf
from tests.tiny_checkpoints import write_tiny_checkpoint

LEFT = [[1] * 7, [0, 0, 0, 1, 1, 1, 1]]


def test_without_torch_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        torch_tracer.importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name)
    )
    with pytest.raises(ExportError, match=r"--via torch needs torch.*pip install '\.\[torch\]'"):
        trace_checkpoint("anything", tmp_path / "out")


def interface(path: Path) -> list[tuple[str | None, str]]:
    model = load_model(path / "model.onnx")
    return [(value.name, str(value.shape)) for value in (*model.graph.inputs, *model.graph.outputs)]


@pytest.mark.torch
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_traced_and_built_graphs_are_interchangeable(tmp_path: Path, model_type: str) -> None:
    pytest.importorskip("torch")
    source = write_tiny_checkpoint(tmp_path / "in", model_type)
    result = trace_checkpoint(str(source), tmp_path / "traced")
    export_checkpoint(str(source), tmp_path / "built")
    assert interface(tmp_path / "traced") == interface(tmp_path / "built")
    model = load_model(tmp_path / "traced" / "model.onnx")
    assert dict(model.opset_imports) == {"": 18}
    assert not model.functions
    assert str(tmp_path).encode() not in (tmp_path / "traced" / "model.onnx").read_bytes()
    assert b"site-packages" not in (tmp_path / "traced" / "model.onnx").read_bytes()
    onnx.checker.check_model(str(tmp_path / "traced" / "model.onnx"), full_check=True)
    assert result.manifest.model == ModelConfig.from_file(source / "config.json").shape()
    config = ModelConfig.from_file(source / "config.json")
    decoders = [OnnxDecoder(tmp_path / name / "model.onnx", config) for name in ("traced", "built")]
    for step in steps_of(LEFT, (1, 3), vocab=config.vocab_size):
        real = step[1][:, -step[0].shape[1] :].astype(bool)
        traced, built = (decoder.step(*step) for decoder in decoders)
        np.testing.assert_allclose(traced[real], built[real], atol=5e-5)


@pytest.mark.torch
def test_an_architecture_the_builder_refuses(tmp_path: Path) -> None:
    """A Llama has Qwen3's tensors without the q and k norms."""
    pytest.importorskip("torch")
    source = write_tiny_checkpoint(tmp_path / "in", "qwen2")
    config = json.loads((source / "config.json").read_text())
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": True}
    (source / "config.json").write_text(json.dumps(config))
    from tests.tiny_checkpoints import random_tensors, tiny_config, write_safetensors

    tensors = random_tensors(tiny_config("qwen2"))
    tensors |= {f"model.layers.{i}.self_attn.o_proj.bias": np.zeros(64, np.float32) for i in range(2)}
    write_safetensors(source / "model.safetensors", tensors, "float32")
    with pytest.raises(ExportError, match="LlamaForCausalLM"):
        export_checkpoint(str(source), tmp_path / "out")
    result = trace_checkpoint(str(source), tmp_path / "out")
    assert result.manifest.model.model_type == "llama"
    shape = ModelConfig.from_dict(tiny_config("qwen2"), "tiny")
    ours, theirs = OnnxDecoder(tmp_path / "out" / "model.onnx", shape), TorchDecoder(source)
    for step in steps_of(LEFT, (1,), vocab=512):
        real = step[1][:, -step[0].shape[1] :].astype(bool)
        np.testing.assert_allclose(ours.step(*step)[real], theirs.step(*step)[real], atol=5e-5)


@pytest.mark.torch
def test_a_gguf_file_and_float16(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    config: dict[str, Any] = gguf_config("qwen2", num_hidden_layers=1, hidden_size=64, intermediate_size=64)
    write_gguf(tmp_path / "tiny.gguf", config)
    trace_checkpoint(str(tmp_path / "tiny.gguf"), tmp_path / "traced", dtype="fp16")
    export_checkpoint(str(tmp_path / "tiny.gguf"), tmp_path / "built", dtype="fp32")
    parsed = open_gguf(tmp_path / "tiny.gguf").config
    traced = OnnxDecoder(tmp_path / "traced" / "model.onnx", parsed, np.float16)
    built = OnnxDecoder(tmp_path / "built" / "model.onnx", parsed)
    for step in steps_of([[1] * 5], (1,), vocab=512):
        reference = built.step(*step)
        assert np.abs(traced.step(*step) - reference).max() < 0.02 * np.abs(reference).max()
    assert (tmp_path / "traced" / "tokenizer.json").is_file()


@pytest.mark.torch
@pytest.mark.parametrize("damage", ["config", "weights"])
def test_a_checkpoint_transformers_cannot_load(tmp_path: Path, damage: str) -> None:
    pytest.importorskip("torch")
    source = write_tiny_checkpoint(tmp_path / "in")
    if damage == "config":
        (source / "config.json").write_text('{"model_type": "no_such_model"}')
    else:
        (source / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ExportError, match="transformers cannot load it") as caught:
        trace_checkpoint(str(source), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    with pytest.raises(ExportError, match="no such file or directory"):
        trace_checkpoint(str(tmp_path / "absent"), tmp_path / "out")
