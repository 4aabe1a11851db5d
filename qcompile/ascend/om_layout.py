"""The layout of an .om file: header, partition table, partitions; little-endian throughout.

Offsets come from CANN's published headers; no .om of a real compiler was at hand, so docs/ascend.md says how to compare.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

from qcompile.ascend.proto_text import message_classes
from qcompile.errors import GraphError
from qcompile.tensors import DataFile

MAGIC = 0x444F4D49
HEADER_BYTES = 256
VERSION, OLD_VERSION = 0x20000000, 0x10000000
# magic headsize version checksum length encrypt checksum? type genmode name ops userinfo om_ir model_num platform
# platform_type pad model_length check_os dynamic
HEADER = struct.Struct("<III64sIBBBB32sI32sII20sB3xQBB62s")
MODEL_TYPES = {0: "IR model", 1: "standard", 2: "tiny", 3: "flow", 4: "lite", 5: "bundle"}
PARTITIONS = {
    0: "MODEL_DEF", 1: "WEIGHTS_DATA", 2: "TASK_INFO", 3: "TBE_KERNELS", 4: "CUST_AICPU_KERNELS", 5: "SO_BINS",
    6: "FLOW_MODEL", 7: "FLOW_SUBMODEL", 8: "MODEL_INOUT_INFO", 9: "STATIC_TASK_DESC", 10: "DYNAMIC_TASK_DESC",
    11: "TASK_PARAM", 12: "TILING_DATA", 20: "PRE_MODEL_DESC", 21: "PRE_MODEL_SQE", 22: "PRE_KERNEL_ARGS",
    23: "PRE_MODEL_DESC_EXTEND", 24: "BUNDLE_MODEL_INFO", 25: "BUNDLE_MODEL_VAR_INFO", 26: "CUSTOM_OPS",
}  # fmt: skip
MODEL_DEF, WEIGHTS_DATA, TASK_INFO, TBE_KERNELS, SO_BINS = 0, 1, 2, 3, 5
_FLOW = 3
_MAX_PARTITIONS = 64
_MAX_MODELS = 64
_TABLE, _ENTRY = struct.Struct("<II"), struct.Struct("<II QQ")
_OLD_TABLE, _OLD_ENTRY = struct.Struct("<I"), struct.Struct("<III")

# DataType of the graph IR; ACL numbers them differently.
GE_TYPES = {
    0: "undefined", 1: "f32", 2: "f16", 3: "i8", 4: "u8", 5: "i16", 6: "u16", 7: "i32", 8: "i64", 9: "u32", 10: "u64",
    11: "bool", 12: "f64", 13: "string", 27: "bf16", 28: "i4", 33: "hif8", 34: "f8e5m2", 35: "f8e4m3",
}  # fmt: skip


@dataclass(frozen=True)
class Header:
    """What the first 256 bytes say."""

    version: int
    is_encrypted: bool
    model_type: int
    name: str
    num_ops: int
    ir_version: int
    num_models: int
    platform_version: str
    length: int
    is_os_bound: bool
    is_dynamic: bool


@dataclass(frozen=True)
class Partition:
    """One part of a model in the file."""

    kind: int
    offset: int
    size_bytes: int

    @property
    def name(self) -> str:
        """Its name in CANN."""
        return PARTITIONS.get(self.kind, f"type {self.kind}")


@functools.cache
def om_messages() -> dict[str, type[Any]]:
    """Return the message classes of om.proto."""
    text = resources.files("qcompile.ascend").joinpath("om.proto").read_text(encoding="utf-8")
    return message_classes(text, "qcompile/om.proto")


def read_header(file: DataFile) -> Header:
    """Read and check the header.

    Raises:
        GraphError: It is no .om file, or too short.
    """
    if file.size_bytes < HEADER_BYTES:
        raise GraphError(f"{file.path}: {file.size_bytes} bytes; an .om file starts with a header of {HEADER_BYTES}")
    fields = HEADER.unpack(file.map(0, HEADER_BYTES).tobytes())
    magic, head_bytes, version, _, length, encrypted, _, kind, _, name, ops = fields[:11]
    _, ir_version, num_models, platform, _, model_length, os_bound, dynamic, _ = fields[11:]
    if magic != MAGIC:
        raise GraphError(f"{file.path}: is not an .om file: it starts with {magic:#010x}, {MAGIC:#010x} is expected")
    if head_bytes != HEADER_BYTES or version not in {VERSION, OLD_VERSION}:
        raise GraphError(
            f"{file.path}: header of {head_bytes} bytes, version {version:#x}; {HEADER_BYTES} and {VERSION:#x} or "
            f"{OLD_VERSION:#x} are known: a newer CANN, or damaged"
        )
    return Header(
        version=version,
        is_encrypted=bool(encrypted),
        model_type=kind,
        name=_text(name),
        num_ops=ops,
        ir_version=ir_version,
        num_models=num_models,
        platform_version=_text(platform),
        length=model_length or length,
        is_os_bound=bool(os_bound),
        is_dynamic=bool(dynamic),
    )


def read_partitions(file: DataFile, header: Header) -> list[list[Partition]]:
    """Return the partitions of each model in the file, offsets from the start of the file.

    Raises:
        GraphError: A table or a partition does not fit the file.
    """
    is_new = _has_long_table(file, header)
    count = max(1, min(header.num_models, _MAX_MODELS))
    models, at = [], HEADER_BYTES
    for _ in range(count):
        partitions, at = _read_table(file, at, is_new)
        models.append(partitions)
        if at >= file.size_bytes:
            break
    if header.num_models > len(models):
        raise GraphError(f"{file.path}: announces {header.num_models} models, holds {len(models)}; it is damaged")
    return models


def _has_long_table(file: DataFile, header: Header) -> bool:
    fields = HEADER.unpack(file.map(0, HEADER_BYTES).tobytes())
    return bool(fields[16]) or header.model_type == _FLOW


def _read_table(file: DataFile, at: int, is_new: bool) -> tuple[list[Partition], int]:
    head, entry = (_TABLE, _ENTRY) if is_new else (_OLD_TABLE, _OLD_ENTRY)
    count = head.unpack(_piece(file, at, head.size, "the partition table"))[0]
    if not 1 <= count <= _MAX_PARTITIONS:
        raise GraphError(f"{file.path}: {count} partitions at byte {at}; 1 to {_MAX_PARTITIONS} are plausible")
    table = _piece(file, at + head.size, count * entry.size, "the partition table")
    start = at + head.size + count * entry.size
    partitions, used = [], 0
    for kind, *numbers in entry.iter_unpack(table):
        size = numbers[-1]
        if start + used + size > file.size_bytes:
            name = PARTITIONS.get(kind, f"type {kind}")
            raise GraphError(
                f"{file.path}: partition {name} ends at byte {start + used + size}, the file has {file.size_bytes}; "
                "it is truncated or damaged"
            )
        partitions.append(Partition(kind, start + used, size))
        used += size
    return partitions, start + used


def _piece(file: DataFile, offset: int, size_bytes: int, what: str) -> bytes:
    if offset + size_bytes > file.size_bytes:
        raise GraphError(f"{file.path}: ends within {what}; it is truncated")
    return file.map(offset, size_bytes).tobytes()


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "replace")


def find_partition(partitions: list[Partition], kind: int) -> Iterator[Partition]:
    """Yield the partitions of a kind."""
    return (partition for partition in partitions if partition.kind == kind)
