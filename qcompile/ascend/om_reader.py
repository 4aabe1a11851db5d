"""Read an .om file: what goes in and comes out, which operators the compiler made, whether the fusions happened.

The file is untrusted: only the header, the tables and the MODEL_DEF partition are read, nothing is allocated by a length
that was read, and one operator at a time is parsed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from qcompile.ascend.chips import Chip
from qcompile.ascend.om_layout import (
    GE_TYPES,
    MODEL_DEF,
    WEIGHTS_DATA,
    Header,
    Partition,
    find_partition,
    om_messages,
    read_header,
    read_partitions,
)
from qcompile.errors import AtcError, GraphError
from qcompile.tensors import DataFile

_MAX_MODEL_DEF_BYTES = 96 << 20
_MAX_OPS = 500_000
_GEAR_INPUT = "ascend_mbatch_shape_data"
_NOT_COMPUTED = frozenset({"Data", "Const", "Constant", "FileConstant", "NetOutput", "Variable", "RefData"})
_OUTPUT_NAME = re.compile(r"^.+:\d+(:.*)?$", re.DOTALL)
_SOC = re.compile(r"--soc_version=(\S+)")


@dataclass(frozen=True)
class OmPort:
    """One input or output: shape as in the ONNX graph where the file keeps it, else as stored."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    layout: str


@dataclass(frozen=True)
class OmModel:
    """One model of the file.

    Attributes:
        name: Its name.
        partitions: In file order.
        inputs: In the order of their index; without the gear selector.
        outputs: In order, named `node:index:tensor`.
        gears: Per gear the shapes of all inputs; empty when static.
        ops: Operators after fusion by type, over all subgraphs.
        engines: Operators by the library that runs them, where the file says.
        fused_from: Names of original nodes by the fused operator's type, where the file says: how many.
        num_graphs: Graphs, the main one included.
        weight_bytes: Size of the weights inside the file.
        external_weights: Files the weights are in when they are not.
        soc_version: Chip it was built for, or "" when the file does not say.
        attributes: Further plain attributes of the model.
    """

    name: str
    partitions: tuple[Partition, ...]
    inputs: tuple[OmPort, ...]
    outputs: tuple[OmPort, ...]
    gears: tuple[tuple[tuple[int, ...], ...], ...]
    ops: Counter[str]
    engines: Counter[str]
    fused_from: Counter[str]
    num_graphs: int
    weight_bytes: int
    external_weights: tuple[str, ...]
    soc_version: str
    attributes: dict[str, str]


@dataclass(frozen=True)
class OmFile:
    """An .om file."""

    path: Path
    size_bytes: int
    header: Header
    models: tuple[OmModel, ...]


def read_om(path: Path) -> OmFile:
    """Read an .om file.

    Raises:
        GraphError: It is missing, no .om file, encrypted, truncated or damaged.
    """
    try:
        file = DataFile(path)
    except FileNotFoundError:
        raise GraphError(f"{path}: no such file") from None
    except OSError as error:
        raise GraphError(f"{path}: cannot be read: {error.strerror or error}") from error
    header = read_header(file)
    if header.is_encrypted:
        raise GraphError(f"{path}: is encrypted; only its owner can read it")
    models = tuple(_read_model(file, partitions) for partitions in read_partitions(file, header))
    return OmFile(path, file.size_bytes, header, models)


def require_chip(om: OmFile, chip: Chip) -> None:
    """Refuse an .om that says it was built for another chip.

    Raises:
        AtcError: Both names are in the message.
    """
    for model in om.models:
        if model.soc_version and model.soc_version.lower() != chip.name.lower():
            raise AtcError(f"{om.path}: was built for {model.soc_version}, this is {chip.name}; build it for this chip")


def _read_model(file: DataFile, partitions: list[Partition]) -> OmModel:
    messages = om_messages()
    definition = next(find_partition(partitions, MODEL_DEF), None)
    weight_bytes = sum(p.size_bytes for p in find_partition(partitions, WEIGHTS_DATA))
    if definition is None:
        names = ", ".join(p.name for p in partitions)
        raise GraphError(f"{file.path}: has no MODEL_DEF partition (it has {names}); only its header can be trusted")
    if definition.size_bytes > _MAX_MODEL_DEF_BYTES:
        raise GraphError(
            f"{file.path}: MODEL_DEF of {definition.size_bytes} bytes; at most {_MAX_MODEL_DEF_BYTES} are read"
        )
    raw = file.map(definition.offset, definition.size_bytes).tobytes()
    model = _parsed(messages["ModelDef"], raw, file.path, "MODEL_DEF")
    if not model.graph:
        raise GraphError(f"{file.path}: MODEL_DEF has no graph; the file is damaged")
    graphs = [
        _Graph.read(_parsed(messages["GraphDef"], graph, file.path, "a graph"), file.path) for graph in model.graph
    ]
    attributes = {str(key): _plain(value) for key, value in model.attr.items()}
    return _summary(model.name, partitions, graphs, attributes, weight_bytes, _output_names(model.attr))


def _parsed(kind: type[Any], raw: bytes, path: Path, what: str) -> Any:
    message = kind()
    try:
        message.ParseFromString(raw)
    except (DecodeError, UnicodeDecodeError):
        raise GraphError(f"{path}: {what} is not a protobuf message of this kind; the file is damaged") from None
    return message


@dataclass
class _Graph:
    """What is kept of one graph of the file."""

    name: str
    data: list[tuple[int, OmPort]]
    outputs: list[OmPort]
    ops: Counter[str]
    engines: Counter[str]
    fused_from: Counter[str]
    external: list[str]
    has_gears: bool

    @classmethod
    def read(cls, graph: Any, path: Path) -> _Graph:
        """Go through the operators one by one."""
        found = cls(str(graph.name), [], [], Counter(), Counter(), Counter(), [], False)
        if len(graph.op) > _MAX_OPS:
            raise GraphError(f"{path}: a graph of {len(graph.op)} operators; at most {_MAX_OPS} are read")
        kind = om_messages()["OpDef"]
        for raw in graph.op:
            found.add(_parsed(kind, raw, path, "an operator"))
        return found

    def add(self, op: Any) -> None:
        """Count one operator."""
        self.ops[str(op.type)] += 1
        engine = _plain(op.attr["_ge_attr_op_kernel_lib_name"]) if "_ge_attr_op_kernel_lib_name" in op.attr else ""
        if engine:
            self.engines[engine] += 1
        if "_datadump_original_op_names" in op.attr:
            self.fused_from[str(op.type)] += len(op.attr["_datadump_original_op_names"].list.s)
        if op.type == "Data":
            self._add_input(op)
        elif op.type == "NetOutput":
            self.outputs = [_port(desc, _source(op, i)) for i, desc in enumerate(op.input_desc)]
        elif op.type == "FileConstant":
            for key in ("location", "file_path"):
                if key in op.attr and _plain(op.attr[key]):
                    self.external.append(_plain(op.attr[key]))
                    break

    def _add_input(self, op: Any) -> None:
        if op.name == _GEAR_INPUT:
            self.has_gears = True
            return
        index = op.attr["index"].i if "index" in op.attr else len(self.data)
        descriptions = op.output_desc or op.input_desc
        port = _port(descriptions[0], str(op.name)) if descriptions else OmPort(str(op.name), "undefined", (), "")
        self.data.append((int(index), port))


def _summary(
    name: str,
    partitions: list[Partition],
    graphs: list[_Graph],
    attributes: dict[str, str],
    weight_bytes: int,
    output_names: list[str],
) -> OmModel:
    main, others = graphs[0], graphs[1:]
    outputs = main.outputs
    if len(output_names) == len(outputs):
        outputs = [OmPort(n, p.dtype, p.shape, p.layout) for n, p in zip(output_names, outputs, strict=True)]
    is_geared = main.has_gears or main.ops["Case"] > 0
    gears = [tuple(port.shape for _, port in sorted(g.data, key=_by_index)) for g in others if is_geared and g.data]
    command = attributes.get("atc_cmdline", "")
    match = _SOC.search(command)
    total: Counter[str] = sum((graph.ops for graph in graphs), Counter())
    return OmModel(
        name=str(name),
        partitions=tuple(partitions),
        inputs=tuple(port for _, port in sorted(main.data, key=_by_index)),
        outputs=tuple(outputs),
        gears=tuple(gears),
        ops=Counter({op: n for op, n in total.items() if op not in _NOT_COMPUTED}),
        engines=sum((graph.engines for graph in graphs), Counter()),
        fused_from=sum((graph.fused_from for graph in graphs), Counter()),
        num_graphs=len(graphs),
        weight_bytes=weight_bytes,
        external_weights=tuple(dict.fromkeys(text for graph in graphs for text in graph.external)),
        soc_version=attributes.get("soc_version") or (match.group(1) if match else ""),
        attributes=attributes,
    )


def _by_index(entry: tuple[int, OmPort]) -> int:
    return entry[0]


def _source(op: Any, index: int) -> str:
    if index < len(op.src_name):
        output = op.src_index[index] if index < len(op.src_index) else 0
        return f"{op.src_name[index]}:{output}"
    return str(op.input[index]) if index < len(op.input) else f"output {index}"


def _port(description: Any, name: str) -> OmPort:
    shape = description.shape.dim
    if "origin_shape" in description.attr and description.attr["origin_shape"].list.i:
        shape = description.attr["origin_shape"].list.i
    dtype = GE_TYPES.get(int(description.dtype), f"type {description.dtype}")
    return OmPort(name, dtype, tuple(int(d) for d in shape[:32]), str(description.layout))


def _output_names(attributes: Any) -> list[str]:
    """The list of `node:index:tensor` among the model's attributes, under whatever name it goes."""
    candidates = [(key, value.list.s) for key, value in attributes.items() if len(value.list.s)]
    candidates.sort(key=lambda item: "out_node" not in item[0])
    for _, strings in candidates:
        names = [text.decode("utf-8", "replace") for text in strings]
        if all(_OUTPUT_NAME.match(text) for text in names):
            return names
    return []


def _plain(value: Any) -> str:
    kind = value.WhichOneof("value")
    if kind == "s":
        return str(value.s[:4096].decode("utf-8", "replace"))
    if kind in {"i", "f", "b", "dt"}:
        return str(getattr(value, kind))
    if kind == "list":
        return ", ".join(_items(value.list))
    return ""


def _items(value: Any) -> Iterator[str]:
    yield from (text[:256].decode("utf-8", "replace") for text in value.s[:64])
    for numbers in (value.i, value.f, value.b, value.dt):
        yield from (str(number) for number in numbers[:64])
