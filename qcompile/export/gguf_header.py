"""Parse a GGUF header (versions 2 and 3, little endian) from an untrusted file.

The gguf package's own reader makes two arrays per vocabulary entry (7 s and 0.5 GB for Qwen's 152 thousand
tokens) and follows any length it meets; here every length is checked against what is left of the file before
it is used. Types, block sizes and dequantization are the package's.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGUF_MAGIC,
    GGMLQuantizationType,
    GGUFValueType,
)

from qcompile.errors import ExportError
from qcompile.tensors import DataFile

_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_MAX_NAME_BYTES = 1024
_MAX_TEXT_BYTES = 16 << 20
# no vocabulary comes near; a damaged length must not fill memory
_MAX_COUNT = 16 << 20
_MIN_TENSOR_ENTRY_BYTES = 8 + 4 + 8 + 4 + 8
_MIN_FIELD_BYTES = 8 + 4 + 1
_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


@dataclass(frozen=True)
class GgufEntry:
    """One tensor of the file: dimensions outermost first, quantization type, absolute byte range."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata by key, and the tensors by name."""

    fields: dict[str, Any]
    entries: dict[str, GgufEntry]


def read_header(file: DataFile) -> GgufHeader:
    """Parse and check a header.

    Raises:
        ExportError: Not GGUF, another version or byte order, truncated, or a length that leads outside the
            file.
    """
    cursor = _Cursor(file)
    if file.size_bytes < 24 or cursor.number("I") != GGUF_MAGIC:
        raise ExportError(f"{file.path}: is not a GGUF file (its first four bytes are not 'GGUF')")
    version = cursor.number("I")
    if version not in _VERSIONS:
        what = "big-endian" if version & 0xFFFF == 0 else f"version {version}"
        raise ExportError(f"{file.path}: {what} GGUF is not read; little-endian version 2 or 3 is")
    num_tensors = cursor.count(_MIN_TENSOR_ENTRY_BYTES, "tensors")
    num_fields = cursor.count(_MIN_FIELD_BYTES, "metadata fields")
    fields = {}
    for _ in range(num_fields):
        key = cursor.text(_MAX_NAME_BYTES)
        fields[key] = cursor.value(cursor.value_type())
    raw = [_raw_entry(cursor) for _ in range(num_tensors)]
    alignment = fields.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise ExportError(f"{file.path}: general.alignment is {alignment!r}, a power of two is expected")
    start = -(-cursor.position // alignment) * alignment
    entries = {}
    for name, dims, kind, offset in raw:
        if name in entries:
            raise ExportError(f"{file.path}: tensor '{name}' is listed twice; the file is damaged")
        entries[name] = _entry(file, name, dims, kind, start + offset)
    return GgufHeader(fields, entries)


class _Cursor:
    """Reads forward through the header, never past the end of the file."""

    def __init__(self, file: DataFile) -> None:
        self.path: Path = file.path
        self.size_bytes = file.size_bytes
        self.view = memoryview(file.map(0, file.size_bytes).data)
        self.position = 0

    def take(self, size_bytes: int) -> memoryview:
        if size_bytes > self.size_bytes - self.position:
            raise ExportError(
                f"{self.path}: the GGUF header needs {size_bytes} bytes at byte {self.position}, the "
                "file has "
                f"{self.size_bytes}: it is truncated or damaged; download it again"
            )
        self.position += size_bytes
        return self.view[self.position - size_bytes : self.position]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, min_bytes_each: int, what: str) -> int:
        count: int = self.number("Q")
        if count > _MAX_COUNT or count * min_bytes_each > self.size_bytes - self.position:
            raise ExportError(
                f"{self.path}: the GGUF header at byte {self.position} announces {count} {what}, more "
                "than the file "
                f"of {self.size_bytes} bytes can hold: it is damaged; download it again"
            )
        return count

    def text(self, max_bytes: int = _MAX_TEXT_BYTES) -> str:
        length: int = self.number("Q")
        if length > min(max_bytes, self.size_bytes - self.position):
            raise ExportError(
                f"{self.path}: text of {length} bytes at byte {self.position} of {self.size_bytes}: "
                "the file is truncated "
                "or damaged; download it again"
            )
        raw = self.take(length)
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError:
            raise ExportError(
                f"{self.path}: text at byte {self.position - length} is not UTF-8: the file is damaged"
            ) from None

    def value_type(self) -> GGUFValueType:
        code = self.number("I")
        try:
            return GGUFValueType(code)
        except ValueError:
            raise ExportError(
                f"{self.path}: metadata type {code} at byte {self.position} is unknown: the file is damaged"
            ) from None

    def value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind != GGUFValueType.ARRAY:
            return self.number(_SCALARS[kind])
        item = self.value_type()
        if item == GGUFValueType.ARRAY:
            raise ExportError(f"{self.path}: nested array at byte {self.position}; metadata arrays are flat")
        if item == GGUFValueType.STRING:
            return [self.text() for _ in range(self.count(8, "strings"))]
        code = _SCALARS[item]
        count = self.count(struct.calcsize("<" + code), "values")
        return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize("<" + code))))


def _raw_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.text(_MAX_NAME_BYTES)
    num_dims = cursor.number("I")
    if not 0 < num_dims <= _MAX_DIMENSIONS:
        raise ExportError(f"{cursor.path}: tensor '{name}' has {num_dims} dimensions: the file is damaged")
    dims = tuple(cursor.number("Q") for _ in range(num_dims))
    return name, dims, cursor.number("I"), cursor.number("Q")


def _entry(file: DataFile, name: str, dims: tuple[int, ...], code: int, offset: int) -> GgufEntry:
    where = f"{file.path}: tensor '{name}'"
    try:
        kind = GGMLQuantizationType(code)
    except ValueError:
        raise ExportError(f"{where} has quantization type {code}, which the gguf package does not know") from None
    block_length, block_bytes = GGML_QUANT_SIZES[kind]
    count = 1
    for dim in dims:
        count *= dim
    if count <= 0 or dims[0] % block_length:
        raise ExportError(f"{where} has dimensions {list(dims)}; rows of whole {kind.name} blocks are expected")
    size_bytes = count // block_length * block_bytes
    if offset + size_bytes > file.size_bytes:
        raise ExportError(
            f"{where} ends at byte {offset + size_bytes}, the file has {file.size_bytes}: it is "
            "truncated; download it "
            "again"
        )
    return GgufEntry(name, tuple(reversed(dims)), kind, offset, size_bytes)
