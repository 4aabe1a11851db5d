"""Export: open a source, build its graph, write the compiled-model directory."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from qcompile.artifact import ArtifactWriter, Progress, Provenance
from qcompile.errors import ExportError
from qcompile.export.checkpoint import Checkpoint
from qcompile.export.gguf_source import open_gguf
from qcompile.export.hub import download_checkpoint, is_hub_id, source_path
from qcompile.export.qwen import build_model
from qcompile.export.safetensors_source import open_directory
from qcompile.runtime.manifest import Manifest

DTYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


@dataclass(frozen=True)
class ExportResult:
    """What was written, and what the user should know about it."""

    manifest: Manifest
    num_nodes: int
    num_parameters: int
    size_bytes: int
    notes: tuple[str, ...]


def open_checkpoint(source: str, *, tie: bool = True) -> Checkpoint:
    """Open a Hugging Face directory, a .gguf file, or a hub id (a local path goes first).

    Raises:
        ExportError: There is no such thing, or it cannot be read.
    """
    path = source_path(source)
    if path.is_dir():
        return open_directory(path)
    if path.is_file():
        return open_gguf(path, tie=tie)
    if is_hub_id(source):
        return open_directory(download_checkpoint(source))
    raise ExportError(
        f"{source}: no such file or directory; a checkpoint directory, a .gguf file or a hub id "
        "(owner/name) is "
        "expected"
    )


def export_checkpoint(
    source: str, output: Path, *, dtype: str = "fp32", tie: bool = True, progress: Progress | None = None
) -> ExportResult:
    """Export a checkpoint to a compiled-model directory (target portable).

    Args:
        source: Directory, .gguf file or hub id.
        output: The directory to write.
        dtype: ``fp32``, ``fp16`` or ``bf16``.
        tie: Keep one matrix where embedding and head are the same.
        progress: Called with (bytes written, bytes in total).

    Raises:
        ExportError: The source cannot be read or is not supported.
        ArtifactError: The output cannot be written.
    """
    with ArtifactWriter(output) as artifact:
        checkpoint = open_checkpoint(source, tie=tie)
        model = build_model(checkpoint, DTYPES[dtype], tie=tie)
        notes = [*checkpoint.notes, *_unused(checkpoint, model.graph.initializers)]
        is_tied = checkpoint.ties_head and tie
        embeddings = "tied" if is_tied else "separate"
        saved = artifact.save_graph(model, progress=progress)
        for name, content in checkpoint.files.items():
            artifact.add_file(name, content)
        provenance = Provenance(
            target="portable",
            shape=checkpoint.config.shape(),
            source=checkpoint.description | {"dtype": dtype, "embeddings": embeddings, "notes": notes},
            config=checkpoint.config.to_dict() | {"tie_word_embeddings": is_tied},  # as built, whatever the file says
        )
        manifest = artifact.commit(provenance)
    return ExportResult(
        manifest=manifest,
        num_nodes=len(model.graph),
        num_parameters=sum(count_parameters(model)),
        size_bytes=saved.file.size_bytes + sum(entry.size_bytes for entry in saved.data),
        notes=tuple(notes),
    )


def count_parameters(model: ir.Model) -> Iterable[int]:
    """Yield the number of elements of every weight (the graph's own constants left out)."""
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and not name.startswith(("const.", "rotary.")):
            yield int(tensor.size)


def _unused(checkpoint: Checkpoint, used: Iterable[str]) -> list[str]:
    names = set(used)
    rest = sorted(
        name
        for name in checkpoint.tensors
        # old checkpoints carry rotary buffers; a tied head that equals the embedding is not a loss
        if name not in names and not name.endswith("rotary_emb.inv_freq") and name not in {"lm_head.weight"}
    )
    if not rest:
        return []
    return [f"{len(rest)} tensors of the checkpoint are not used by the model: {', '.join(rest[:3])}"]
