"""What kind of decoder a graph is: from its manifest, a config.json beside it, or its own inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompile.errors import GraphError
from qcompile.model_config import ModelConfig
from qcompile.runtime.manifest import GraphIO, Manifest, ModelShape

DEFAULT_MAX_POSITION = 32768


_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
# The shape in the manifest of a graph that is no decoder: an encoder, a vision model.
NO_DECODER = ModelShape("none", 0, 0, 0, 0, 0, 0)


def is_decoder(graph: ir.Graph) -> bool:
    """Whether a graph can generate: it gives logits and has a KV cache."""
    has_cache = any((v.name or "").startswith("past_key_values.") for v in graph.inputs)
    return has_cache and any(v.name == "logits" for v in graph.outputs)


def refuse_lowered_for_ascend(model: ir.Model, path: Path, manifest: Manifest | None) -> None:
    """Raise GraphError for a static graph that was lowered for an Ascend chip: it is an end, no model to work on.

    Args:
        model: The graph.
        path: Its file, for the message.
        manifest: What lies beside it, if anything does.
    """
    inputs, outputs = ({v.name for v in values} for values in (model.graph.inputs, model.graph.outputs))
    if "past_lengths" in inputs and "next_token" in outputs:
        target = manifest.target if manifest is not None else "an Ascend chip"
        raise GraphError(
            f"{path}: is a static graph lowered for {target}, and no pass takes those; give the directory that it was "
            "lowered from, which `qcompile export` wrote, or which was optimized with --target portable"
        )


def model_io_of(graph: ir.Graph) -> GraphIO:
    """Return the interface of a graph that is no decoder; the dtype is that of its first float output or input."""
    dtypes = [v.dtype for v in (*graph.outputs, *graph.inputs) if v.dtype is not None]
    floats = [dtype.numpy().name for dtype in dtypes if dtype in _FLOATS]
    inputs, outputs = (tuple(v.name or "" for v in values) for values in (graph.inputs, graph.outputs))
    return GraphIO("none", "none", inputs, outputs, floats[0] if floats else "float32")


def describe_any(model: ir.Model, directory: Path, manifest: Manifest | None) -> tuple[ModelShape, dict[str, Any]]:
    """As `describe_model`; `NO_DECODER` for a graph that is none and has no config.json beside it."""
    if manifest is None and not is_decoder(model.graph) and not (directory / "config.json").is_file():
        return NO_DECODER, {}
    return describe_model(model, directory, manifest)


def describe_model(model: ir.Model, directory: Path, manifest: Manifest | None) -> tuple[ModelShape, dict[str, Any]]:
    """Return the model's shape and its config words.

    Raises:
        ExportError: There is a config.json and it is damaged or describes a model qcompile does not know.
        GraphError: There is neither manifest nor config.json, and the graph is not a decoder with a KV cache.
    """
    if manifest is not None:
        return manifest.model, manifest.config
    if (directory / "config.json").is_file():
        config = ModelConfig.from_file(directory / "config.json")
        return config.shape(), config.to_dict()
    return _from_graph(model), {}


def _from_graph(model: ir.Model) -> ModelShape:
    caches = [v for v in model.graph.inputs if (v.name or "").startswith("past_key_values.")]
    keys = [v for v in caches if (v.name or "").endswith(".key") and v.shape is not None and len(v.shape) == 4]
    logits = next((v for v in model.graph.outputs if v.name == "logits" and v.shape is not None), None)
    if not keys or logits is None or logits.shape is None:
        names = ", ".join(v.name or "?" for v in (*model.graph.inputs, *model.graph.outputs))
        raise GraphError(
            f"graph '{model.graph.name}' has {names}: a decoder has past_key_values.{{i}}.key|value and logits; "
            "export it with its KV cache"
        )
    assert keys[0].shape is not None
    kv_heads, head_dim = keys[0].shape[1], keys[0].shape[3]
    vocabulary = logits.shape[-1]
    if not all(isinstance(d, int) for d in (kv_heads, head_dim, vocabulary)):
        raise GraphError(
            f"'{keys[0].name}' {keys[0].shape} or logits {logits.shape}: heads, head size and vocabulary must be numbers"
        )
    return ModelShape(
        model_type="unknown",
        vocab_size=int(vocabulary),  # type: ignore[arg-type]
        num_hidden_layers=len(keys),
        num_attention_heads=int(kv_heads),  # type: ignore[arg-type]
        num_key_value_heads=int(kv_heads),  # type: ignore[arg-type]
        head_dim=int(head_dim),  # type: ignore[arg-type]
        max_position_embeddings=DEFAULT_MAX_POSITION,
    )
