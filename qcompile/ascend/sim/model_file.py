"""Files of the simulated compiler: the .om layout, marked as simulated, with the lowered graph in a partition of its own.

A real loader finds no tasks and no kernels in it. Weights are where ATC would put them: in the WEIGHTS_DATA partition, or
with `--external_weight=1` in files `weight/weight_<sha256>` beside the .om, one per tensor, which several .om files share.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from qcompile.ascend.om_layout import WEIGHTS_DATA, find_partition
from qcompile.ascend.om_reader import OmModel, OmPort, read_om
from qcompile.ascend.om_writer import OmGraph, OmOp, write_om
from qcompile.ascend.shapes import Shape
from qcompile.ascend.sim.gears import SELECTOR, Dims, with_shapes
from qcompile.errors import GraphError
from qcompile.model_reader import load_model
from qcompile.tensors import DataFile, MappedTensor, pieces_of

PLATFORM = "simulated"
GRAPH_PARTITION = 1000  # no number of CANN's
_INSIDE = "WEIGHTS_DATA"
_WEIGHT_FILE = re.compile(r"weight/weight_[0-9a-f]{64}")
_SMALL_BYTES = 1024
_TYPES = {
    ir.DataType.FLOAT: "f32", ir.DataType.FLOAT16: "f16", ir.DataType.BFLOAT16: "bf16", ir.DataType.INT64: "i64",
    ir.DataType.INT32: "i32", ir.DataType.INT8: "i8", ir.DataType.UINT8: "u8", ir.DataType.UINT64: "u64",
    ir.DataType.BOOL: "bool", ir.DataType.INT16: "i16", ir.DataType.UINT32: "u32", ir.DataType.DOUBLE: "f64",
}  # fmt: skip


@dataclass(frozen=True)
class SimulatedFile:
    """A file of the simulated compiler.

    Attributes:
        path: Where it is.
        model: What `qcompile inspect` shows of it.
        graph: The lowered graph; its weights are mapped.
        weights: Files its weights are in, by name without path.
        work_bytes: Work space it asks for.
        inside_bytes: Size of the weights within the file.
    """

    path: Path
    model: OmModel
    graph: ir.Model
    weights: Mapping[str, Path]
    work_bytes: int
    inside_bytes: int


def compile_graph(
    source: Path,
    output: Path,
    soc_version: str,
    command: str,
    *,
    outside: bool,
    shapes: Mapping[str, Shape] | None = None,
    gears: tuple[tuple[Dims, ...], ...] = (),
) -> None:
    """Write the simulated .om of a graph.

    Args:
        source: The .onnx file.
        output: The .om file.
        soc_version: Chip it is for.
        command: The compiler's command line, which ATC notes in the file.
        outside: Whether weights go to files beside it.
        shapes: Of the inputs where they are not those of the graph; None for an open dimension.
        gears: Shapes of all inputs in every gear.

    Raises:
        AtcError: The disk is full, or the directory cannot be written.
        OSError: The same, for weights.
        GraphError: The graph cannot be read.
    """
    model = load_model(source)
    for number, node in enumerate(model.graph):
        node.name = node.name or f"{node.op_type}_{number}"  # as ATC's parser does
    for value in model.graph.inputs:
        given = (shapes or {}).get(value.name or "")
        if given is not None:
            value.shape = ir.Shape(given)
    inside = output.with_name(f".{output.name}.weights")
    try:
        _place_weights(model, inside, output.parent if outside else None)
        write_om(
            output,
            output.stem,
            _with_gears(_operators(model), gears),
            platform_version=PLATFORM,
            soc_version=soc_version,
            attributes={
                "simulated": 1,
                "atc_cmdline": command,
                "work_bytes": _work_bytes(model),
                "attr_model_out_nodes_name": [_output_name(value) for value in model.graph.outputs],
            },
            weights=inside,
            partitions=[(GRAPH_PARTITION, ir.to_proto(model).SerializeToString(deterministic=True))],
        )
    finally:
        inside.unlink(missing_ok=True)


def _place_weights(model: ir.Model, inside: Path, directory: Path | None) -> None:
    """Write the weights to files of their own below a directory, or else one after another; the graph then refers to them."""
    with inside.open("wb") as stream:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes <= _SMALL_BYTES:
                continue
            if directory is not None:
                place, offset = _write_weight(tensor, directory), 0
            else:
                place, offset = _INSIDE, stream.tell()
                for _, piece in pieces_of(tensor):
                    stream.write(piece().data)
            shape = ir.Shape(tensor.shape.numpy())
            value.const_value = ir.ExternalTensor(
                place, offset, tensor.nbytes, tensor.dtype, shape=shape, name=value.name or ""
            )


def open_simulated(path: Path) -> SimulatedFile:
    """Read a file of the simulated compiler.

    Raises:
        GraphError: It is none, or it is damaged.
    """
    om = read_om(path)
    model = om.models[0]
    partition = next(find_partition(list(model.partitions), GRAPH_PARTITION), None)
    if om.header.platform_version != PLATFORM or partition is None:
        raise GraphError(f"{path}: was not made by the simulated compiler; only a real device can run it")
    file = DataFile(path)
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(file.map(partition.offset, partition.size_bytes).tobytes())
        graph = ir.from_proto(proto)
    except (DecodeError, ValueError, TypeError, KeyError, AttributeError, ir.serde.SerdeError) as error:
        raise GraphError(f"{path}: its graph cannot be read: {error}") from error
    inside = next(find_partition(list(model.partitions), WEIGHTS_DATA), None)
    start, length = (inside.offset, inside.size_bytes) if inside is not None else (0, 0)
    weights: dict[str, Path] = {}
    for value in graph.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        at, location = tensor.offset or 0, str(tensor.location)
        if location != _INSIDE and not _WEIGHT_FILE.fullmatch(location):
            raise GraphError(f"{path}: weight '{value.name}' is in '{location}', no place of the compiler's")
        if location == _INSIDE and not 0 <= at <= at + (tensor.length or 0) <= length:
            raise GraphError(f"{path}: weight '{value.name}' lies outside the weights")
        source = file if location == _INSIDE else _open_weight(path, location, weights)
        at += start if location == _INSIDE else 0
        value.const_value = MappedTensor(source, at, tensor.dtype, ir.Shape(tensor.shape.numpy()), value.name or "")
    work = model.attributes.get("work_bytes", "")
    return SimulatedFile(path, model, graph, weights, int(work) if work.isdigit() else _SMALL_BYTES, length)


def _open_weight(om: Path, location: str, found: dict[str, Path]) -> DataFile:
    place = om.parent / location
    found[place.name] = place
    try:
        return DataFile(place)
    except OSError as error:
        raise GraphError(f"{place}: cannot be opened: {error.strerror or error}; copy `weight` with the .om") from error


def _write_weight(tensor: ir.TensorProtocol, directory: Path) -> str:
    """Write a tensor to the file named after its content; returns the name relative to the .om."""
    folder = directory / "weight"
    folder.mkdir(exist_ok=True)
    temporary = folder / f".{os.getpid()}.tmp"
    digest = hashlib.sha256()
    try:
        with temporary.open("wb") as stream:
            for _, piece in pieces_of(tensor):
                data = piece().data
                digest.update(data)
                stream.write(data)
        name = f"weight/weight_{digest.hexdigest()}"
        temporary.replace(directory / name)
    finally:
        temporary.unlink(missing_ok=True)
    return name


def _operators(model: ir.Model) -> OmGraph:
    """List the graph as ATC's parser has it; nothing is fused here, and nothing pretends to be."""
    graph = model.graph
    ops = [
        OmOp("Data", value.name or "", outputs=(_port(value),), attributes={"index": index})
        for index, value in enumerate(graph.inputs)
    ]
    for value in graph.initializers.values():
        tensor = value.const_value
        place = str(tensor.location) if isinstance(tensor, ir.ExternalTensor) else _INSIDE
        attributes = {"location": place} if place != _INSIDE else {}
        ops.append(
            OmOp("FileConstant" if attributes else "Const", value.name or "", (), (), (_port(value),), attributes)
        )
    for node in graph:
        given = [value for value in node.inputs if value is not None]
        ops.append(
            OmOp(
                node.op_type,
                node.name or "",
                tuple(_source(value) for value in given),
                tuple(_port(value) for value in given),
                tuple(_port(value) for value in node.outputs),
            )
        )
    sources = tuple(_source(value) for value in graph.outputs)
    ops.append(OmOp("NetOutput", "Node_Output", sources, tuple(_port(value) for value in graph.outputs)))
    return OmGraph(graph.name or "graph", tuple(ops))


def _with_gears(graph: OmGraph, gears: tuple[tuple[Dims, ...], ...]) -> list[OmGraph]:
    """Add what ATC adds for gears: the input that selects one, and a graph per gear with its shapes."""
    if not gears:
        return [graph]
    data = [op for op in graph.ops if op.type == "Data"]
    num_open = sum(size < 0 for op in data for size in op.outputs[0].shape)
    selector = OmOp("Data", SELECTOR, outputs=(OmPort("", "i32", (num_open,), "ND"),), attributes={"index": len(data)})
    names = tuple(f"gear_{index}" for index in range(len(gears)))
    case = OmOp("Case", "gears", (f"{SELECTOR}:0",), subgraphs=names)
    others = []
    for name, shapes in zip(names, gears, strict=True):
        ops = [
            OmOp("Data", op.name, outputs=with_shapes(op.outputs, [shape]), attributes={"index": index})
            for index, (op, shape) in enumerate(zip(data, shapes, strict=True))
        ]
        others.append(OmGraph(name, tuple(ops)))
    return [OmGraph(graph.name, (*graph.ops, selector, case)), *others]


def _port(value: ir.Value) -> OmPort:
    shape = tuple(d if isinstance(d, int) else -1 for d in value.shape) if value.shape is not None else ()
    return OmPort(value.name or "", _TYPES.get(value.dtype or ir.DataType.UNDEFINED, "undefined"), shape, "ND")


def _source(value: ir.Value) -> str:
    producer = value.producer()
    return f"{value.name}:0" if producer is None else f"{producer.name}:{value.index() or 0}"


def _output_name(value: ir.Value) -> str:
    return f"{_source(value)}:{value.name}"


def _work_bytes(model: ir.Model) -> int:
    """Work space the file asks for: room for its four largest intermediate tensors."""
    sizes = []
    for node in model.graph:
        for value in node.outputs:
            count = 1
            for size in value.shape or ():
                count *= size if isinstance(size, int) else 1
            sizes.append(count * max(1, (value.dtype or ir.DataType.FLOAT).bitwidth // 8))
    return max(_SMALL_BYTES, -(-sum(sorted(sizes)[-4:]) // 512) * 512)
