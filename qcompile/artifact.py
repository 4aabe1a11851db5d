"""The compiled-model directory: staged beside its final place, complete or absent.

    with ArtifactWriter(Path("out")) as artifact:
        artifact.save_graph(model)
        artifact.copy_auxiliary(source_directory)
        artifact.commit(Provenance("portable", config.shape()))

Nothing appears at `out` before `commit`; leaving the block without it (an error, Ctrl-C) deletes the staging
directory. An existing compiled-model directory is replaced; files in it that its manifest does not list are
kept. Anything else in the way is refused.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import onnx_ir as ir

from qcompile import __version__
from qcompile.errors import ArtifactError, GraphError
from qcompile.model_reader import load_model
from qcompile.runtime.manifest import (
    MANIFEST_NAME,
    FileEntry,
    GraphEntry,
    GraphIO,
    Manifest,
    ModelShape,
    sha256_of,
)
from qcompile.staging import claim_staging, discard_stale, release_staging
from qcompile.weights_writer import Progress, SavedModel, save_model, save_models, write_failure

GRAPH_NAME = "model.onnx"
WEIGHTS_NAME = "weights.data"  # of several graphs
AUXILIARY_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)

__all__ = [
    "AUXILIARY_NAMES",
    "GRAPH_NAME",
    "WEIGHTS_NAME",
    "ArtifactWriter",
    "Progress",
    "Provenance",
    "SavedModel",
    "check_output",
    "find_graph",
    "find_manifest",
    "graph_io_of",
    "load_model",
    "save_model",
]


def find_graph(path: Path) -> tuple[Path, Manifest | None]:
    """Return the .onnx file that `path` means, and the manifest beside it if there is one.

    Args:
        path: An .onnx file, or a compiled-model directory.

    Raises:
        GraphError: The directory has neither a manifest nor a model.onnx.
        ManifestError: There is a manifest and it is damaged.
    """
    if not path.is_dir():
        manifest = Manifest.load(path.parent) if (path.parent / MANIFEST_NAME).is_file() else None
        listed = manifest is not None and any(entry.file.name == path.name for entry in manifest.graphs)
        return path, manifest if listed else None
    if (path / MANIFEST_NAME).is_file():
        manifest = Manifest.load(path)
        if all(entry.bucket is not None for entry in manifest.graphs):
            raise GraphError(
                f"{path}: holds {len(manifest.graphs)} static graphs for {manifest.target}, no model to work on; give "
                "the directory they were lowered from; `qcompile inspect` and `qcompile check` take its .onnx files"
            )
        role = "model" if any(entry.role == "model" for entry in manifest.graphs) else "decoder"
        return path / manifest.graph(role).file.name, manifest
    if (path / GRAPH_NAME).is_file():
        return path / GRAPH_NAME, None
    raise GraphError(
        f"{path}: holds neither {MANIFEST_NAME} nor {GRAPH_NAME}; name an .onnx file or a directory that "
        "`qcompile export` wrote"
    )


def find_manifest(path: Path) -> Manifest | None:
    """Return the manifest of a compiled-model directory, or of the one an .onnx file is in; None without one."""
    directory = path if path.is_dir() else path.parent
    return Manifest.load(directory) if (directory / MANIFEST_NAME).is_file() else None


def graph_io_of(model: ir.Model) -> GraphIO:
    """Read from a decoder graph's inputs how it is to be fed.

    Raises:
        GraphError: The graph has no logits output.
    """
    inputs = tuple(value.name or "" for value in model.graph.inputs)
    outputs = tuple(value.name or "" for value in model.graph.outputs)
    if "logits" not in outputs:
        raise GraphError(f"graph '{model.graph.name}' has outputs {', '.join(outputs)}; 'logits' is expected")
    dtype = model.graph.outputs[outputs.index("logits")].dtype
    for value in model.graph.inputs:
        if (value.name or "").startswith("past_key_values.") and value.dtype != ir.DataType.INT8:
            dtype = value.dtype
            break
    names = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}
    if dtype not in names:
        raise GraphError(f"graph '{model.graph.name}' has logits or KV cache of type {dtype}; a float type is expected")
    return GraphIO(
        kv_cache="shared" if "seqlens_k" in inputs else "concat",
        logits="last" if "last_token_index" in inputs else "all",
        inputs=inputs,
        outputs=outputs,
        dtype=names[dtype],
        attention="plain" if _multiplies_as_is(model.graph) else "",
    )


def _multiplies_as_is(graph: ir.Graph) -> bool:
    """Return whether every attention kernel of ONNX Runtime here has scale 1 and a float32 cache."""
    kernels = [node for node in graph if node.op_type == "GroupQueryAttention"]
    scales = [node.attributes["scale"].as_float() if "scale" in node.attributes else 0.0 for node in kernels]
    pasts = [node.inputs[3] if len(node.inputs) > 3 else None for node in kernels]
    caches = {past.dtype if past is not None else None for past in pasts}
    return bool(kernels) and set(scales) == {1.0} and caches == {ir.DataType.FLOAT}


@dataclass(frozen=True)
class Provenance:
    """What a manifest says of a model beside its files; the fields are those of `Manifest`, `shape` is its `model`."""

    target: str
    shape: ModelShape
    passes: tuple[dict[str, Any], ...] = ()
    quantization: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    verification: dict[str, Any] = field(default_factory=dict)


class ArtifactWriter:
    """Builds one compiled-model directory; use it as a context manager.

    Args:
        directory: Where the directory shall be. Missing parents are created.

    Raises:
        ArtifactError: Something that is not a compiled-model directory is in the way, or it cannot be
            written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(os.path.abspath(directory))
        self._graphs: list[GraphEntry] = []
        self._files: dict[str, FileEntry] = {}
        self._lock: int | None = None
        # a link is followed: staging must be on the file system the result is on
        self._final = Path(os.path.realpath(directory))
        self.path = self._final

    def __enter__(self) -> ArtifactWriter:
        with _as_artifact_error(self.directory):
            # a mount point (a container's volume) cannot be renamed over: its staging is inside
            staged_for = self._final / "staging" if self._is_mounted() else self._final
            discard_stale(staged_for)
            _refuse_what_is_in_the_way(self.directory)
            staged_for.parent.mkdir(parents=True, exist_ok=True)
            self.path, self._lock = claim_staging(staged_for)
        return self

    def _is_mounted(self) -> bool:
        return os.path.ismount(self._final)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            release_staging(self._lock)
            self._lock = None

    def save_graph(
        self,
        model: ir.Model,
        *,
        name: str = GRAPH_NAME,
        role: str = "decoder",
        io: GraphIO | None = None,
        progress: Progress | None = None,
    ) -> SavedModel:
        """Write one graph and its weights; `io` is read from the graph when not given."""
        saved = save_model(model, self.path / name, progress=progress, known_as=self.directory / name)
        self._graphs.append(GraphEntry(role, saved.file, saved.data, io or graph_io_of(model)))
        return saved

    def save_graphs(
        self, graphs: Sequence[tuple[GraphEntry, ir.Model]], *, data_name: str, progress: Progress | None = None
    ) -> list[SavedModel]:
        """Write graphs that share one file of weights; of each entry given, role, file name, interface and bucket count."""
        models = {entry.file.name: model for entry, model in graphs}
        saved = save_models(models, self.path, data_name, progress=progress, known_as=self.directory)
        for (entry, _), files in zip(graphs, saved, strict=True):
            self._graphs.append(dataclasses.replace(entry, file=files.file, data=files.data))
        return saved

    def add_file(self, name: str, content: bytes | Path) -> None:
        """Write an auxiliary file (tokenizer.json, …) from bytes, or copy it from a path."""
        if Path(name).name != name:
            raise ValueError(f"{name!r} is not a plain file name")
        destination = self.path / name
        with _as_artifact_error(self.directory / name):
            if isinstance(content, Path):
                shutil.copyfile(content, destination)
            else:
                destination.write_bytes(content)
        self._files[name] = FileEntry(name, destination.stat().st_size, sha256_of(destination))

    def copy_auxiliary(self, source: Path) -> None:
        """Copy tokenizer, chat template and generation config from a directory; absent ones are skipped."""
        for name in AUXILIARY_NAMES:
            if (source / name).is_file():
                self.add_file(name, source / name)

    def commit(self, provenance: Provenance) -> Manifest:
        """Write the manifest and move the directory to its place."""
        manifest = self.stage(provenance)
        self.publish()
        return manifest

    def stage(self, provenance: Provenance) -> Manifest:
        """Write the manifest into the staging directory, so that the model can be tried before `publish`."""
        manifest = Manifest(
            target=provenance.target,
            model=provenance.shape,
            graphs=tuple(self._graphs),
            files=tuple(self._files.values()),
            passes=provenance.passes,
            quantization=provenance.quantization,
            source=provenance.source,
            config=provenance.config,
            verification=provenance.verification,
            qcompile_version=__version__,
        )
        text = json.dumps(dataclasses.asdict(manifest), indent=1, ensure_ascii=False) + "\n"
        with _as_artifact_error(self.directory):
            (self.path / MANIFEST_NAME).write_text(text, encoding="utf-8")
        return manifest

    def publish(self) -> None:
        """Move the staged directory to its place."""
        with _as_artifact_error(self.directory):
            if self._is_mounted():
                _move_files(self.path, self._final)
            else:
                _move_into_place(self.path, self._final)


def check_output(directory: Path, source: Path) -> None:
    """Refuse, before any work, a directory that a model cannot be written to.

    Args:
        directory: Where it shall be.
        source: The .onnx file that it is made from.

    Raises:
        ArtifactError: It is the source's own directory, or something that is not a compiled-model directory is in the way.
    """
    real = os.path.realpath(source)
    if os.path.realpath(directory) in (os.path.realpath(source.parent), os.path.dirname(real)):
        raise ArtifactError(
            f"{directory}: holds the model that is read, which would be gone; choose another output directory"
        )
    with _as_artifact_error(directory):
        _refuse_what_is_in_the_way(directory)


def _refuse_what_is_in_the_way(directory: Path) -> None:
    if directory.is_symlink() and not directory.exists():
        raise ArtifactError(f"{directory}: is a dangling link; remove it or choose another output directory")
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ArtifactError(f"{directory}: is a file; choose another output directory")
    if any(directory.iterdir()) and _listed_names(directory) is None:
        raise ArtifactError(
            f"{directory}: holds files and is not a compiled-model directory; choose another output "
            "directory (only what qcompile wrote is ever overwritten)"
        )


def _listed_names(directory: Path) -> set[str] | None:
    """Return the names a manifest lists (of any schema version), or None when there is no usable manifest."""
    try:
        record = json.loads((directory / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or "schema_version" not in record:
        return None
    names = {MANIFEST_NAME, *_names_in(record.get("graphs")), *_names_in(record.get("files"))}
    return {name for name in names if Path(name).name == name}


def _names_in(record: Any) -> Iterator[str]:
    if isinstance(record, dict):
        if isinstance(record.get("name"), str) and "sha256" in record:
            yield record["name"]
        for value in record.values():
            yield from _names_in(value)
    elif isinstance(record, list):
        for value in record:
            yield from _names_in(value)


def _move_into_place(staged: Path, directory: Path) -> None:
    """Rename `staged` to `directory`; files there that its old manifest does not list are kept."""
    listed = _listed_names(directory)
    if not directory.exists() or listed is None:
        staged.replace(directory)
        return
    retired = staged.with_name(f"{staged.name}.old")
    directory.replace(retired)
    try:
        staged.replace(directory)
    except OSError:
        retired.replace(directory)
        raise
    for kept in sorted(retired.iterdir()):
        if kept.name not in listed and not (directory / kept.name).exists():
            kept.replace(directory / kept.name)
    shutil.rmtree(retired, ignore_errors=True)


def _move_files(staged: Path, directory: Path) -> None:
    """Move each file of `staged` into a directory, the manifest last (without one it looks incomplete)."""
    outdated = _listed_names(directory) or set()
    (directory / MANIFEST_NAME).unlink(missing_ok=True)
    names = [path.name for path in staged.iterdir()]
    for name in sorted(names, key=lambda name: name == MANIFEST_NAME):
        (staged / name).replace(directory / name)
    for name in outdated.difference(names):
        (directory / name).unlink(missing_ok=True)


@contextmanager
def _as_artifact_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArtifactError(write_failure(path, error)) from error
