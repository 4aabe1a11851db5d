"""Write an ONNX model with its weights beside it, one piece at a time.

Worker threads compute the next pieces (dequantize, transpose, convert) while this one writes and hashes;
what is in flight is bounded by bytes, so peak memory is about `IN_FLIGHT_BYTES`, or the largest single piece
if that is more. Files get a temporary name first and are renamed when they are complete.
"""

import errno
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import onnx_ir as ir
from google.protobuf.message import EncodeError  # type: ignore[import-untyped]

from qcompile.errors import ArtifactError, GraphError
from qcompile.runtime.manifest import FileEntry
from qcompile.tensors import Array, MappedTensor, Piece, pieces_of

IN_FLIGHT_BYTES = 192 << 20
INLINE_BYTES = 1024
_LARGE_BYTES = 64 << 10  # from here on a tensor begins on a page; the smaller ones, a page each to lose, stand behind
_PAGE_BYTES = 4096
_SMALL_ALIGNMENT_BYTES = 64

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SavedModel:
    """The files `save_model` wrote: the graph, and its weights (empty when all of them are small)."""

    file: FileEntry
    data: tuple[FileEntry, ...]


def save_model(
    model: ir.Model, path: Path, *, progress: Progress | None = None, known_as: Path | None = None
) -> SavedModel:
    """Write `path` and `path` + ".data"; see `save_models`.

    Args:
        model: Any model; `qcompile.tensors` has the frugal kinds of initializers.
        path: The .onnx file to write.
        progress: Called with (bytes written, bytes in total) after each piece, from the calling thread.
        known_as: The path to name in messages, when `path` is a staging place.
    """
    shown = known_as or path
    return save_models({path.name: model}, path.parent, f"{path.name}.data", progress=progress, known_as=shown.parent)[
        0
    ]


def save_models(
    models: Mapping[str, ir.Model],
    directory: Path,
    data_name: str,
    *,
    progress: Progress | None = None,
    known_as: Path | None = None,
) -> list[SavedModel]:
    """Write models that share one file of weights; the models themselves are left as they were.

    Initializers above 1 KiB go to the data file, each once even if several initializers or models share it.

    Args:
        models: Models by the name of their .onnx file.
        directory: Where they go. Existing files are replaced only when the new ones are complete.
        data_name: Name of the file of weights.
        progress: Called with (bytes written, bytes in total) after each piece, from the calling thread.
        known_as: The directory to name in messages, when `directory` is a staging place.

    Raises:
        ArtifactError: The files cannot be written (no space, no permission); nothing is left behind.
        GraphError: A graph cannot be serialized.
    """
    shown = known_as or directory
    layout = _Layout.of(models.values())
    with ExitStack() as stack:
        data_temporary = stack.enter_context(_temporary(directory / data_name))
        temporaries = {name: stack.enter_context(_temporary(directory / name)) for name in models}
        data: tuple[FileEntry, ...] = ()
        if layout.tensors:
            with _told_as_artifact_error(shown / data_name), data_temporary.open("xb", buffering=0) as stream:
                hashed = _HashedFile(stream, layout.total_bytes, progress)
                _write_weights(layout, hashed)
            data = (hashed.entry(data_name),)
        saved = []
        for name, model in models.items():
            graph_bytes = _serialize(model, layout, data_name)
            with _told_as_artifact_error(shown / name):
                temporaries[name].write_bytes(graph_bytes)
            saved.append(SavedModel(FileEntry(name, len(graph_bytes), hashlib.sha256(graph_bytes).hexdigest()), data))
        with _told_as_artifact_error(shown / next(iter(models))):
            # an old graph must not meet new weights, not even if we are killed between the renames
            for name in models:
                (directory / name).unlink(missing_ok=True)
            if data:
                data_temporary.replace(directory / data_name)
            for name, temporary in temporaries.items():
                temporary.replace(directory / name)
    return saved


@dataclass(frozen=True)
class _Layout:
    """Where each tensor goes in the data file; tensors that share bytes share a place."""

    tensors: tuple[ir.TensorProtocol, ...]
    offsets: dict[object, int]
    total_bytes: int

    @classmethod
    def of(cls, models: Iterable[ir.Model]) -> "_Layout":
        tensors, offsets, end = [], {}, 0
        placed = [tensor for model in models for _, tensor in _outside(model)]
        for tensor in sorted(placed, key=lambda tensor: tensor.nbytes < _LARGE_BYTES):
            key = _identity(tensor)
            if key not in offsets:
                alignment = _PAGE_BYTES if tensor.nbytes >= _LARGE_BYTES else _SMALL_ALIGNMENT_BYTES
                offsets[key] = -(-end // alignment) * alignment
                end = offsets[key] + tensor.nbytes
                tensors.append(tensor)
        return cls(tuple(tensors), offsets, end)


def _outside(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """Yield the initializers that go to the data file."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None:
                raise GraphError(f"initializer '{value.name}' has no value; the model cannot be saved")
            if tensor.nbytes > INLINE_BYTES and tensor.dtype != ir.DataType.STRING:
                yield value, tensor


def _identity(tensor: ir.TensorProtocol) -> object:
    if isinstance(tensor, MappedTensor):
        return (id(tensor.file), tensor.offset, tensor.dtype, tuple(tensor.shape.numpy()))
    return id(tensor)


class _HashedFile:
    """An unbuffered stream that hashes what is written to it."""

    def __init__(self, stream: IO[bytes], total_bytes: int, progress: Progress | None) -> None:
        self.stream, self.total_bytes, self.progress = stream, total_bytes, progress
        self.digest = hashlib.sha256()
        self.size_bytes = 0

    def write(self, buffer: memoryview | bytes) -> None:
        view = memoryview(buffer)
        self.digest.update(view)
        while len(view):
            view = view[self.stream.write(view) :]
        self.size_bytes += memoryview(buffer).nbytes
        if self.progress is not None:
            self.progress(self.size_bytes, self.total_bytes)

    def pad_to(self, offset: int) -> None:
        if offset > self.size_bytes:
            self.write(bytes(offset - self.size_bytes))

    def entry(self, name: str) -> FileEntry:
        return FileEntry(name, self.size_bytes, self.digest.hexdigest())


def _write_weights(layout: _Layout, hashed: _HashedFile) -> None:
    waiting: deque[tuple[int, int, str, Future[Array]]] = deque()
    in_flight_bytes = 0
    workers = ThreadPoolExecutor(max(1, min(4, os.cpu_count() or 1)), thread_name_prefix="weights")
    try:
        for offset, size_bytes, name, piece in _all_pieces(layout):
            while waiting and in_flight_bytes + size_bytes > IN_FLIGHT_BYTES:
                in_flight_bytes -= _write_first(waiting, hashed)
            waiting.append((offset, size_bytes, name, workers.submit(piece)))
            in_flight_bytes += size_bytes
        while waiting:
            _write_first(waiting, hashed)
    finally:
        workers.shutdown(wait=True, cancel_futures=True)


def _all_pieces(layout: _Layout) -> Iterator[tuple[int, int, str, Piece]]:
    for tensor in layout.tensors:
        offset = layout.offsets[_identity(tensor)]
        for size_bytes, piece in pieces_of(tensor):
            yield offset, size_bytes, tensor.name or "", piece
            offset += size_bytes


def _write_first(waiting: "deque[tuple[int, int, str, Future[Array]]]", hashed: _HashedFile) -> int:
    offset, size_bytes, name, future = waiting.popleft()
    try:
        array = np.ascontiguousarray(future.result())
    except OSError as error:
        raise GraphError(f"initializer '{name}': its data cannot be read: {error}") from error
    if array.nbytes != size_bytes:
        raise GraphError(f"initializer '{name}' gave {array.nbytes} bytes, its type and shape say {size_bytes}")
    hashed.pad_to(offset)
    hashed.write(array.reshape(-1).view(np.uint8).data)
    return size_bytes


def _serialize(model: ir.Model, layout: _Layout, location: str) -> bytes:
    kept = list(_outside(model))
    try:
        for value, tensor in kept:
            value.const_value = ir.ExternalTensor(
                location,
                layout.offsets[_identity(tensor)],
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
            )
        graph_bytes: bytes = ir.to_proto(model).SerializeToString()
    except (EncodeError, ValueError, ir.serde.SerdeError) as error:
        raise GraphError(f"the graph cannot be serialized: {error}") from error
    else:
        return graph_bytes
    finally:
        for value, tensor in kept:
            value.const_value = tensor


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Name a file next to `path`; whatever still has that name afterwards is deleted."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _told_as_artifact_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArtifactError(write_failure(path, error)) from error


def write_failure(path: Path, error: OSError) -> str:
    """Say in one line why `path` could not be written and what to do."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        cure = "free some space or choose another output directory; no partial file is left"
    else:
        cure = "check that the directory exists and can be written; no partial file is left"
    return f"{path}: cannot be written: {error.strerror or error}; {cure}"
