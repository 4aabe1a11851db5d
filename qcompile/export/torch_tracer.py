"""Export by tracing: torch.onnx.export (dynamo) of the transformers model, with the builder's interface.

For checkpoints the builder does not know. The whole model is held in memory, which the builder never does.
"""

import importlib.util
import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.artifact import ArtifactWriter, Progress, Provenance
from qcompile.errors import ExportError
from qcompile.export.checkpoint import EMBEDDING, HEAD, Checkpoint
from qcompile.export.export_checkpoint import ExportResult
from qcompile.export.gguf_source import open_gguf
from qcompile.export.graph_builder import Dims
from qcompile.export.hub import download_checkpoint, is_hub_id, source_path
from qcompile.export.qwen import B, P, S, T
from qcompile.export.tokenizer_files import tokenizer_files
from qcompile.model_config import read_json_object
from qcompile.runtime.manifest import ModelShape

OPSET = 18
_TORCH_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# example sizes: all different, none of them 1, so that the tracer takes no dimension for a constant or for
# another
_BATCH, _NEW, _PAST = 2, 3, 5


def trace_checkpoint(
    source: str, output: Path, *, dtype: str = "fp32", progress: Progress | None = None
) -> ExportResult:
    """Trace a checkpoint to a compiled-model directory (target portable).

    Args:
        source: Directory, .gguf file or hub id.
        output: The directory to write.
        dtype: ``fp32``, ``fp16`` or ``bf16``.
        progress: Called with (bytes written, bytes in total).

    Raises:
        ExportError: torch or transformers is not installed, or the model cannot be loaded or traced.
        ArtifactError: The output cannot be written.
    """
    _require("torch", "transformers")
    with ArtifactWriter(output) as artifact:
        notes: list[str] = []
        torch_model, files, record = _load(source, _TORCH_DTYPES[dtype], notes)
        shape = _shape(torch_model.config)
        model = _trace(torch_model, shape, source)
        _name_dimensions(model, shape)
        saved = artifact.save_graph(model, progress=progress)
        for name, content in files.items():
            artifact.add_file(name, content)
        provenance = Provenance(
            target="portable",
            shape=shape,
            source={"format": "torch", "path": source, "dtype": dtype, "via": "torch", "notes": notes},
            config=record,
        )
        manifest = artifact.commit(provenance)
    return ExportResult(
        manifest=manifest,
        num_nodes=len(model.graph),
        num_parameters=sum(int(parameter.numel()) for parameter in torch_model.parameters()),
        size_bytes=saved.file.size_bytes + sum(entry.size_bytes for entry in saved.data),
        notes=tuple(notes),
    )


def _require(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"--via torch needs {' and '.join(missing)}, not installed here; pip install '.[torch]' in qcompile's "
            "checkout, or leave --via out"
        )


def _load(source: str, dtype: str, notes: list[str]) -> tuple[Any, dict[str, bytes | Path], dict[str, Any]]:
    """Return the transformers model, the tokenizer's files and config.json as a dict."""
    path = source_path(source)
    if path.is_file():
        checkpoint = open_gguf(path)
        notes.extend(checkpoint.notes)
        return model_of(checkpoint, dtype), dict(checkpoint.files), checkpoint.config.to_dict()
    if not path.is_dir():
        if not is_hub_id(source):
            raise ExportError(f"{source}: no such file or directory, and not a hub id (owner/name)")
        path = download_checkpoint(source)
    record = read_json_object(path / "config.json")
    return _pretrained(path, dtype), tokenizer_files(path, notes), record


def _pretrained(path: Path, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        with _quiet():
            model = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=getattr(torch, dtype),
                attn_implementation="eager",
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
            )
    except Exception as error:
        # whatever a model class raises, the user needs to know which checkpoint it was
        raise ExportError(f"{path}: transformers cannot load it: {_first_line(error)}") from error
    return model.eval()


def model_of(checkpoint: Checkpoint, dtype: str) -> Any:
    """Return a transformers model with a checkpoint's tensors (a GGUF file has no other way in)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    record = checkpoint.config.to_dict() | {"tie_word_embeddings": checkpoint.ties_head}
    config = AutoConfig.for_model(**{key: value for key, value in record.items() if key != "torch_dtype"})
    with _quiet():
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    state = {}
    for name in checkpoint.tensors:
        tensor = checkpoint.tensors[name]
        rows = tensor.shape[0] if len(tensor.shape) == 2 else 1
        values = tensor.block(slice(0, rows), slice(0, tensor.shape[-1])).reshape(tensor.shape)
        state[name] = torch.from_numpy(np.array(values, dtype=np.float32))
    if checkpoint.ties_head:
        kept = state.get(HEAD, state.get(EMBEDDING))
        state |= {HEAD: kept, EMBEDDING: kept}
    model.load_state_dict(state, strict=True)
    return model.to(getattr(torch, dtype)).eval()


def _shape(config: Any) -> ModelShape:
    text = config.get_text_config()
    heads = text.num_attention_heads
    return ModelShape(
        model_type=text.model_type,
        vocab_size=text.vocab_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        max_position_embeddings=text.max_position_embeddings,
    )


def _trace(torch_model: Any, shape: ModelShape, source: str) -> ir.Model:
    import torch

    example = _example(shape, torch_model.dtype)
    tokens, cached = {0: B, 1: S}, {0: B, 2: P}
    names = [f"{i}.{kind}" for i in range(shape.num_hidden_layers) for kind in ("key", "value")]
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                _decoder(torch_model),
                example,
                dynamo=True,
                opset_version=OPSET,
                input_names=[
                    "input_ids",
                    "attention_mask",
                    "position_ids",
                    *(f"past_key_values.{n}" for n in names),
                ],
                output_names=["logits", *(f"present.{name}" for name in names)],
                dynamic_shapes=(tokens, {0: B, 1: T}, tokens, [(cached, cached) for _ in example[3]]),
                verbose=False,
            )
    except Exception as error:
        # torch.export raises dozens of types of its own
        raise ExportError(f"{source}: torch.onnx.export cannot trace it: {_first_line(error)}") from error
    model: ir.Model = program.model
    return model


def cache_argument(torch_model: Any) -> str:
    """Return what a transformers model calls the KV cache that it takes and gives: ``cache`` since 5.24."""
    return "cache" if "cache" in inspect.signature(torch_model.forward).parameters else "past_key_values"


def _decoder(torch_model: Any) -> Any:
    """Return the model as a torch module that takes and gives the KV cache as pairs of tensors."""
    import torch
    from transformers import DynamicCache

    cache_name = cache_argument(torch_model)

    class Decoder(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = torch_model

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, past: Any) -> Any:
            answer = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=True,
                **{cache_name: DynamicCache(past)},
            )
            return answer.logits, [(layer.keys, layer.values) for layer in getattr(answer, cache_name).layers]

    return Decoder().eval()


def _example(shape: ModelShape, dtype: Any) -> tuple[Any, Any, Any, list[tuple[Any, Any]]]:
    """Return token ids, mask, positions and past of the example sizes."""
    import torch

    size = (_BATCH, shape.num_key_value_heads, _PAST, shape.head_dim)
    past = [(torch.zeros(size, dtype=dtype), torch.zeros(size, dtype=dtype)) for _ in range(shape.num_hidden_layers)]
    return (
        torch.ones(_BATCH, _NEW, dtype=torch.int64),
        torch.ones(_BATCH, _PAST + _NEW, dtype=torch.int64),
        torch.arange(_PAST, _PAST + _NEW).expand(_BATCH, _NEW).contiguous(),
        past,
    )


def _name_dimensions(model: ir.Model, shape: ModelShape) -> None:
    """Give inputs and outputs the builder's dimensions; drop the tracer's notes (they hold local paths)."""
    kv_heads, head_dim = shape.num_key_value_heads, shape.head_dim
    dims: dict[str, Dims] = {"input_ids": [B, S], "attention_mask": [B, T], "position_ids": [B, S]}
    for value in (*model.graph.inputs, *model.graph.outputs):
        name = value.name or ""
        if name == "logits":
            value.shape = ir.Shape([B, S, shape.vocab_size])
        elif name.startswith("past_key_values."):
            value.shape = ir.Shape([B, kv_heads, P, head_dim])
        elif name.startswith("present."):
            value.shape = ir.Shape([B, kv_heads, T, head_dim])
        else:
            value.shape = ir.Shape(dims[name])
    used = {node.domain for node in model.graph} | {""}
    for domain in list(model.opset_imports):
        if domain not in used:
            del model.opset_imports[domain]
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the tracer's prints, warnings and log lines off the terminal; what matters is raised."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no reason given'}"
