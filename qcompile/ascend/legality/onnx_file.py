"""Read an ONNX file as ATC does, names and duplicates included, without its weights.

onnx-ir normalizes what ATC trips over (two `opset_import` entries of one domain, "ai.onnx" for ""), so legality works on the
protobuf messages themselves. Inline weights are cut out while reading: the file is mapped, and each large `raw_data`
becomes a reference to its place in the file. A file above 2 GiB, which protobuf would refuse, is read the same way.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from qcompile.errors import GraphError
from qcompile.tensors import DataFile

_KEEP_BYTES = 1 << 12
_MAX_MESSAGE_BYTES = 512 << 20
_MODEL_GRAPH, _GRAPH_INITIALIZER, _TENSOR_RAW_DATA = 7, 5, 9
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass
class OnnxFile:
    """One model file.

    Attributes:
        path: Where it is.
        size_bytes: Size of the .onnx file itself.
        proto: The model without large inline weights.
        inline: Name of each initializer that was cut out -> offset and length of its bytes in the file.
    """

    path: Path
    size_bytes: int
    proto: onnx.ModelProto
    inline: dict[str, tuple[int, int]] = field(default_factory=dict)
    _files: dict[str, DataFile] = field(default_factory=dict)

    def bytes_of(self, tensor: onnx.TensorProto) -> npt.NDArray[np.uint8] | None:
        """Return the bytes of an initializer, mapped; None when they are stored in a typed field or missing."""
        if tensor.name in self.inline:
            offset, length = self.inline[tensor.name]
            return self._file("").map(offset, length)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            offset, length = int(entries.get("offset") or 0), int(entries.get("length") or -1)
            file = self._file(entries.get("location", ""))
            return file.map(offset, length if length >= 0 else file.size_bytes - offset)
        return np.frombuffer(tensor.raw_data, np.uint8) if tensor.HasField("raw_data") else None

    def data_files(self) -> dict[str, DataFile]:
        """Open every external data file the initializers name.

        Raises:
            GraphError: One is missing, lies outside the model's directory, or is too short.
        """
        for tensor in self.proto.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL and tensor.name not in self.inline:
                self._check_external(tensor)
        return {name: file for name, file in self._files.items() if name}

    def _check_external(self, tensor: onnx.TensorProto) -> None:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        where = f"{self.path}: initializer '{tensor.name}'"
        for key in ("offset", "length"):
            if not (
                entries.get(key, "0").isascii() and entries.get(key, "0").isdigit() and len(entries.get(key, "0")) < 20
            ):
                raise GraphError(
                    f"{where} has external data with {key} {entries[key]!r}; a number of bytes is expected"
                )
        location = entries.get("location", "")
        if not location or os.path.isabs(location) or "\0" in location or ".." in Path(location).parts:
            raise GraphError(f"{where} refers to '{location}'; external data must lie in the model's own directory")
        allowed = {Path(os.path.realpath(self.path.parent)), Path(os.path.realpath(self.path)).parent}
        real = Path(os.path.realpath(self.path.parent / location))
        if not any(real.is_relative_to(directory) for directory in allowed):
            raise GraphError(f"{where} refers to '{location}', a link that leaves the model's directory; copy the file")
        try:
            file = self._file(location)
        except FileNotFoundError:
            missing = self.path.parent / location
            raise GraphError(f"{where}: its data file {missing} is missing; copy it next to the model") from None
        except OSError as error:
            raise GraphError(f"{where}: its data file cannot be opened: {error}") from error
        end = int(entries.get("offset", "0")) + int(entries.get("length", "0"))
        if end > file.size_bytes:
            raise GraphError(f"{where} ends at byte {end} of {file.path}, which has {file.size_bytes}; it is truncated")

    def _file(self, location: str) -> DataFile:
        if location not in self._files:
            self._files[location] = DataFile(self.path.parent / location if location else self.path)
        return self._files[location]


def read_onnx(path: Path) -> OnnxFile:
    """Read a model file without its weights.

    Raises:
        GraphError: The file is missing, empty, or not an ONNX model.
    """
    try:
        if path.is_dir():
            raise GraphError(f"{path}: is a directory, an .onnx file is expected")
        with path.open("rb") as stream:
            size_bytes = os.fstat(stream.fileno()).st_size
            if size_bytes == 0:
                raise GraphError(f"{path}: is not an ONNX model: it is empty")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                message, inline = _without_weights(data, path)
    except FileNotFoundError:
        raise GraphError(f"{path}: no such file") from None
    except OSError as error:
        raise GraphError(f"{path}: cannot be read: {error.strerror or error}") from error
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(message)
    except DecodeError:
        raise _not_onnx(path, "its bytes are not a protobuf message") from None
    if not (proto.HasField("graph") or proto.opset_import or proto.ir_version > 0):
        raise _not_onnx(path, "it has neither a graph nor an operator set")
    return OnnxFile(path, size_bytes, proto, inline)


def _not_onnx(path: Path, reason: str) -> GraphError:
    return GraphError(f"{path}: is not an ONNX model: {reason}")


def _without_weights(data: mmap.mmap, path: Path) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Return the message without large raw_data of initializers, and where in the file those bytes are."""
    inline: dict[str, tuple[int, int]] = {}
    try:
        message = b"".join(_model(data, inline))
    except (_Malformed, IndexError):
        raise _not_onnx(path, "its bytes are not a protobuf message") from None
    return message, inline


class _Malformed(Exception):
    """The bytes are not what the protobuf wire format allows."""


def _model(data: mmap.mmap, inline: dict[str, tuple[int, int]]) -> Iterator[bytes]:
    kept = 0
    for number, start, body, end in _fields(data, 0, len(data)):
        if number == _MODEL_GRAPH and body is not None:
            graph = b"".join(_graph(data, body, end, inline))
            part = _tag(number) + _varint(len(graph)) + graph
        else:
            part = _copied(data, start, end)
        kept += len(part)
        if kept > _MAX_MESSAGE_BYTES:
            raise _Malformed
        yield part


def _graph(data: mmap.mmap, start: int, stop: int, inline: dict[str, tuple[int, int]]) -> Iterator[bytes]:
    for number, begin, body, end in _fields(data, start, stop):
        if number == _GRAPH_INITIALIZER and body is not None and end - body > _KEEP_BYTES:
            tensor = _tensor(data, body, end, inline)
            yield _tag(number) + _varint(len(tensor)) + tensor
        else:
            yield _copied(data, begin, end)


def _tensor(data: mmap.mmap, start: int, stop: int, inline: dict[str, tuple[int, int]]) -> bytes:
    parts, raw = [], None
    for number, begin, body, end in _fields(data, start, stop):
        if number == _TENSOR_RAW_DATA and body is not None and end - body > _KEEP_BYTES:
            raw = (body, end - body)
        else:
            parts.append(_copied(data, begin, end))
    message = b"".join(parts)
    if raw is not None:
        tensor = onnx.TensorProto()
        try:
            tensor.ParseFromString(message)
        except DecodeError:
            raise _Malformed from None
        inline[tensor.name] = raw
        tensor.data_location = onnx.TensorProto.EXTERNAL
        message = tensor.SerializeToString()
    return message


def _copied(data: mmap.mmap, start: int, end: int) -> bytes:
    if end - start > _MAX_MESSAGE_BYTES:
        raise _Malformed
    return data[start:end]


def _fields(data: mmap.mmap, start: int, stop: int) -> Iterator[tuple[int, int, int | None, int]]:
    """Yield number, start, start of the body (of length-delimited fields) and end of each field."""
    at = start
    while at < stop:
        begin = at
        key, at = _read_varint(data, at)
        kind, body = key & 7, None
        if kind == _VARINT:
            _, at = _read_varint(data, at)
        elif kind == _BYTES:
            length, body = _read_varint(data, at)
            at = body + length
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise _Malformed
        if at > stop:
            raise _Malformed
        yield key >> 3, begin, body, at


def _read_varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _Malformed


def _tag(number: int) -> bytes:
    return _varint(number << 3 | _BYTES)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
