"""Write files in the .om layout: for tests, and for the simulated compiler. Never what a device could run.

graph = OmGraph("main", [OmOp("Data", "input_ids", outputs=[OmPort(...)]), ...])
write_om(path, "decode", [graph], platform_version="simulated", soc_version="Ascend910B4")
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from qcompile.ascend.om_layout import (
    GE_TYPES,
    HEADER,
    HEADER_BYTES,
    MAGIC,
    MODEL_DEF,
    TASK_INFO,
    VERSION,
    WEIGHTS_DATA,
    om_messages,
)
from qcompile.ascend.om_reader import OmPort
from qcompile.errors import AtcError

_CHUNK_BYTES = 4 << 20
_TYPE_NUMBERS = {name: number for number, name in GE_TYPES.items()}
Attribute = int | float | str | bytes | Sequence[int] | Sequence[str]


@dataclass(frozen=True)
class OmOp:
    """One operator: type, name, where its inputs come from ("source:index"), and what goes in and out."""

    type: str
    name: str
    inputs: tuple[str, ...] = ()
    input_ports: tuple[OmPort, ...] = ()
    outputs: tuple[OmPort, ...] = ()
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    subgraphs: tuple[str, ...] = ()


@dataclass(frozen=True)
class OmGraph:
    """One graph; the first of a model is the main one."""

    name: str
    ops: tuple[OmOp, ...]


def write_om(
    path: Path,
    name: str,
    graphs: Sequence[OmGraph],
    *,
    platform_version: str,
    soc_version: str = "",
    attributes: Mapping[str, Attribute] | None = None,
    weights: bytes | Path = b"",
    partitions: Sequence[tuple[int, bytes | Path]] = (),
) -> None:
    """Write a file in the .om layout, complete or not at all.

    Args:
        path: Where.
        name: Name of the model.
        graphs: The main graph, then its subgraphs.
        platform_version: Up to 19 characters of the header; says who wrote the file.
        soc_version: Chip the model is for.
        attributes: Further attributes of the model.
        weights: The WEIGHTS_DATA partition, or the file it is in.
        partitions: Further partitions: number and content.

    Raises:
        AtcError: The disk is full, or the directory cannot be written.
    """
    given = {**(attributes or {}), **({"soc_version": soc_version} if soc_version else {})}
    parts = [(MODEL_DEF, model_definition(name, graphs, given)), (WEIGHTS_DATA, weights), (TASK_INFO, b""), *partitions]
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            for chunk in _chunks(name, platform_version, parts):
                stream.write(chunk)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError as error:
        raise AtcError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def model_definition(name: str, graphs: Sequence[OmGraph], attributes: Mapping[str, Attribute]) -> bytes:
    """Return the MODEL_DEF partition."""
    messages = om_messages()
    model = messages["ModelDef"](name=name, version=1)
    for graph in graphs:
        made = messages["GraphDef"](name=graph.name)
        for index, op in enumerate(graph.ops):
            made.op.append(_operator(op, index).SerializeToString(deterministic=True))
        model.graph.append(made.SerializeToString(deterministic=True))
    _set_attributes(model.attr, attributes)
    return bytes(model.SerializeToString(deterministic=True))


def _operator(op: OmOp, index: int) -> Any:
    message = om_messages()["OpDef"](name=op.name, type=op.type, id=index, input=list(op.inputs))
    for source in op.inputs:
        name, _, output = source.rpartition(":")
        message.src_name.append(name)
        message.src_index.append(int(output))
    for ports, descriptions in ((op.input_ports, message.input_desc), (op.outputs, message.output_desc)):
        for port in ports:
            description = descriptions.add(name=port.name, dtype=_TYPE_NUMBERS[port.dtype], layout=port.layout)
            description.shape.dim.extend(port.shape)
    message.subgraph_name.extend(op.subgraphs)
    _set_attributes(message.attr, op.attributes)
    return message


def _set_attributes(target: Any, attributes: Mapping[str, Attribute]) -> None:
    for key, value in attributes.items():
        entry = target[key]
        if isinstance(value, (int, float)):
            setattr(entry, "i" if isinstance(value, int) else "f", value)
        elif isinstance(value, (str, bytes)):
            entry.s = value.encode() if isinstance(value, str) else value
        else:
            for item in value:
                if isinstance(item, str):
                    entry.list.s.append(item.encode())
                else:
                    entry.list.i.append(item)


def _chunks(name: str, platform_version: str, parts: Sequence[tuple[int, bytes | Path]]) -> Iterator[bytes]:
    sizes = [part.stat().st_size if isinstance(part, Path) else len(part) for _, part in parts]
    table = len(parts).to_bytes(8, "little")
    at = 0
    for (kind, _), size in zip(parts, sizes, strict=True):
        table += b"".join(number.to_bytes(8, "little") for number in (kind, at, size))
        at += size
    total = len(table) + at
    yield HEADER.pack(
        MAGIC, HEADER_BYTES, VERSION, b"", total & 0xFFFFFFFF, 0, 1, 0, 0, name.encode()[:31], 0, b"", 0, 1,
        platform_version.encode()[:19], 0, total, 0, 0, b"",
    )  # fmt: skip
    yield table
    for _, part in parts:
        if isinstance(part, Path):
            with part.open("rb") as stream:
                yield from _pieces(stream)
        else:
            yield part


def _pieces(stream: IO[bytes]) -> Iterator[bytes]:
    while chunk := stream.read(_CHUNK_BYTES):
        yield chunk
