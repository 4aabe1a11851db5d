"""What is compared: compiled-model directories, .onnx files, and checkpoints, which are exported once and kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompile import __version__
from qcompile.artifact import AUXILIARY_NAMES, GRAPH_NAME, find_graph, graph_io_of, load_model
from qcompile.errors import QualityError
from qcompile.export.export_checkpoint import export_checkpoint
from qcompile.fetch import cache_directory
from qcompile.model_shape import describe_model
from qcompile.quant.hadamard import Rotation, hadamard_rotation
from qcompile.runtime.manifest import (
    MANIFEST_NAME,
    FileEntry,
    GraphEntry,
    Manifest,
    ModelShape,
    check_file,
    find_file,
    sha256_of,
)
from qcompile.runtime.stop import end_ids
from qcompile.runtime.tokenizer import Tokenizer, read_json_file

Say = Callable[[str, int, int], None]
_HASHED_SUFFIXES = {".json", ".safetensors", ".jinja", ".gguf", ".txt"}
_ORT_TARGETS = ("portable", "ort")


@dataclass(frozen=True)
class OpenedModel:
    """A model found on disk, not loaded yet.

    Attributes:
        name: As the user typed it.
        graph_path: The decoder's .onnx file.
        manifest: What the directory says of itself, or what could be read from the graph.
        size_bytes: Graph and weights on disk.
        note: What was done to get here (an export), for the report.
    """

    name: str
    graph_path: Path
    manifest: Manifest
    size_bytes: int
    note: str = ""

    @property
    def shape(self) -> ModelShape:
        """Vocabulary, layers and head counts."""
        return self.manifest.model

    @property
    def is_static(self) -> bool:
        """Whether its graphs have fixed shapes and only their definitions can be run here."""
        return self.manifest.graphs[0].io.kv_cache == "appended"

    @property
    def max_tokens(self) -> int:
        """The longest text it can read: its own limit, or that of the longest cache of its static graphs."""
        lengths = [g.bucket[2] for g in self.manifest.graphs if g.bucket is not None]
        most = self.shape.max_position_embeddings
        return min(most, max(lengths, default=most))

    def tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer beside the graph, or None when there is none."""
        if find_file(self.manifest, "tokenizer.json") is None:
            return None
        return Tokenizer(self.graph_path.parent, self.manifest)

    def end_ids(self, tokenizer: Tokenizer) -> set[int]:
        """Return the tokens that end an answer."""
        generation = read_json_file(self.graph_path.parent, self.manifest, "generation_config.json")
        return set(end_ids((generation, self.manifest.config), tokenizer))

    def rotation(self, size: int) -> Rotation | None:
        """Return the rotation that `rotate-residual` folded into the weights, if the manifest tells of one of this size."""
        for entry in self.manifest.passes:
            told = (entry.get("detail") or {}).get("rotation") if entry.get("rewrites") else None
            if isinstance(told, dict) and told.get("size") == size and type(told.get("seed")) is int:
                return hadamard_rotation(size, abs(told["seed"]))
        return None

    def record(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        io = self.manifest.graphs[0].io
        return {
            "path": self.name,
            "target": self.manifest.target,
            "kv_cache": io.kv_cache,
            "dtype": io.dtype,
            "size_bytes": self.size_bytes,
            "quantization": self.manifest.quantization,
            "note": self.note,
        }


def open_model(path: Path, say: Say | None = None) -> OpenedModel:
    """Find a model; a checkpoint is exported to fp32 first.

    Args:
        path: A compiled-model directory, an .onnx file, a Hugging Face checkpoint directory, or a .gguf file.
        say: Called with (what, done, total) while a checkpoint is exported.

    Raises:
        QualityError: There is no such path, or it is compiled for another machine.
        QCompileError: What is there cannot be read.
    """
    if not path.exists():
        raise QualityError(f"{path}: no such file or directory")
    if is_checkpoint(path):
        directory, note = _exported(path, say or (lambda what, done, total: None))
        return _open_graph(directory, str(path), note)
    return _open_graph(path, str(path), "")


def is_checkpoint(path: Path) -> bool:
    """Whether a path holds weights to export rather than a graph."""
    if path.is_file():
        return path.suffix == ".gguf"
    has_graph = (path / MANIFEST_NAME).is_file() or (path / GRAPH_NAME).is_file()
    return not has_graph and (path / "config.json").is_file()


def _open_graph(path: Path, name: str, note: str) -> OpenedModel:
    static = _static_manifest(path)
    graph_path, manifest = find_graph(path) if static is None else (path / static.graphs[0].file.name, static)
    if manifest is None:
        manifest = _bare_manifest(graph_path)
    elif static is None and manifest.target not in _ORT_TARGETS:
        raise QualityError(
            f"{name}: compiled for {manifest.target}, which ONNX Runtime does not run; compare the graph it was made "
            "from (target ort or portable)"
        )
    files = {file.name: file for entry in manifest.graphs for file in (entry.file, *entry.data)}
    for file in files.values():
        check_file(graph_path.parent, file, check_hash=False)
    return OpenedModel(name, graph_path, manifest, sum(f.size_bytes for f in files.values()), note)


def _static_manifest(path: Path) -> Manifest | None:
    """Return the manifest of a directory of ONNX graphs with fixed shapes, what is made for ATC; None for any other."""
    if not (path / MANIFEST_NAME).is_file():
        return None
    manifest = Manifest.load(path)
    static = [g.io.kv_cache == "appended" and g.file.name.endswith(".onnx") for g in manifest.graphs]
    return manifest if static and all(static) else None


def _bare_manifest(path: Path) -> Manifest:
    """Describe a graph that has no manifest; tokenizer files beside it are taken as its own."""
    model = load_model(path)
    shape, config = describe_model(model, path.parent, None)
    tensors = (value.const_value for value in model.graph.initializers.values())
    data = sorted({Path(t.path) for t in tensors if isinstance(t, ir.ExternalTensor)})
    inside = [p for p in data if p.parent == path.parent]
    graph = GraphEntry("decoder", _entry(path), tuple(_entry(p) for p in inside), graph_io_of(model))
    files = [path.parent / name for name in AUXILIARY_NAMES if (path.parent / name).is_file()]
    auxiliary = tuple(FileEntry(p.name, p.stat().st_size, sha256_of(p)) for p in files)
    return Manifest(target="portable", model=shape, graphs=(graph,), files=auxiliary, config=config)


def _entry(path: Path) -> FileEntry:
    return FileEntry(path.name, path.stat().st_size, "")


def _exported(source: Path, say: Say) -> tuple[Path, str]:
    """Return the directory of the fp32 export of a checkpoint, made now or earlier from the same bytes."""
    files = _files_of(source)
    directory = cache_directory() / "quality" / _fingerprint(files, say)
    if not (directory / MANIFEST_NAME).is_file():
        export_checkpoint(str(source), directory, progress=lambda done, total: say("exporting", done, total))
        return directory, f"exported to fp32 in {directory}"
    return directory, f"fp32 export of the same bytes found in {directory}"


def _files_of(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    return sorted(p for p in source.iterdir() if p.is_file() and p.suffix in _HASHED_SUFFIXES)


def _fingerprint(files: Sequence[Path], say: Say) -> str:
    """Hash names and contents, and the version that would export them."""
    digest = hashlib.sha256(__version__.encode())
    for i, path in enumerate(files):
        say("hashing", i, len(files))
        try:
            digest.update(f"\0{path.name}\0{sha256_of(path)}".encode())
        except OSError as error:
            raise QualityError(f"{path}: cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()[:32]
