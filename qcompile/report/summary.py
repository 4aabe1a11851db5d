"""Count what a model holds: operators, parameters, bytes per dtype, inputs, outputs, fused functions.

Nothing is read from the weights: shapes and dtypes are enough.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompile.functions import DOMAIN
from qcompile.quantized_functions import EMBEDDINGS, QUANTIZED_LINEARS
from qcompile.runtime.manifest import FileEntry, Manifest
from qcompile.tensors import MappedTensor

STANDARD_DOMAINS = frozenset({"", "ai.onnx"})

# Inputs that are no parameters: scales and zero points of quantized weights, tables of cosines and sines.
_NOT_PARAMETERS = {
    "GroupQueryAttention": (7, 8),
    "RotaryEmbedding": (1, 2, 3),
    "MatMulNBits": (2, 3, 4),
    "MatMulIntegerToFloat": (2, 3, 4, 5, 6),
    **dict.fromkeys(QUANTIZED_LINEARS | EMBEDDINGS, (2, 3)),
    "DequantizeLinear": (1, 2),
    "GatherBlockQuantized": (2, 3),
}

_FLOAT_NAMES = {ir.DataType.FLOAT: "float32", ir.DataType.DOUBLE: "float64"}


@dataclass(frozen=True)
class GraphPort:
    """Name, dtype and shape of a graph input or output; a dim is a number, a symbol, or None when unknown."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None


@dataclass
class DtypeTotal:
    """How many initializers of one dtype there are, their elements and bytes; shared ones count once."""

    tensors: int = 0
    elements: int = 0
    size_bytes: int = 0


@dataclass(frozen=True)
class FunctionUse:
    """A function the model defines, how often it is called, and how many nodes its body has."""

    domain: str
    name: str
    calls: int
    body_nodes: int


@dataclass(frozen=True)
class ModelSummary:
    """What `qcompile inspect` says of one model.

    Attributes:
        path: The .onnx file.
        opsets: Domain to version; "" is the standard domain.
        ops: Operator to number of nodes, most frequent first; a domain other than the standard one in front.
        parameters: Elements of all weights, counted before packing; scales, zero points, cosine tables,
            integer constants and scalars are not parameters, a tied weight counts once.
        weights: Dtype to totals over all initializers.
        functions: The model's own functions, those of domain `qcompile` first.
        files: The files that make up the model, with sizes in bytes.
        target: Of the manifest, when there is one; so are quantization and passes.
    """

    path: str
    producer: str
    ir_version: int
    opsets: dict[str, int]
    ops: dict[str, int]
    parameters: int
    weights: dict[str, DtypeTotal]
    inputs: tuple[GraphPort, ...]
    outputs: tuple[GraphPort, ...]
    functions: tuple[FunctionUse, ...]
    files: dict[str, int]
    target: str | None = None
    quantization: dict[str, Any] = field(default_factory=dict)
    passes: tuple[dict[str, Any], ...] = ()

    @property
    def num_nodes(self) -> int:
        """Nodes of the graph and its subgraphs, function bodies not counted."""
        return sum(self.ops.values())

    @property
    def weight_bytes(self) -> int:
        """Bytes of all initializers."""
        return sum(total.size_bytes for total in self.weights.values())

    @property
    def fused(self) -> dict[str, int]:
        """Fused functions (domain `qcompile`) to number of calls."""
        return {f.name: f.calls for f in self.functions if f.domain == DOMAIN}

    def record(self) -> dict[str, Any]:
        """Return the summary as JSON-ready data."""
        data = asdict(self)
        data["nodes"] = self.num_nodes
        data["weight_bytes"] = self.weight_bytes
        data["fused"] = self.fused
        return data


def summarize(model: ir.Model, path: Path, manifest: Manifest | None = None) -> ModelSummary:
    """Count what `model`, read from `path`, holds."""
    return ModelSummary(
        path=str(path),
        producer=" ".join(part for part in (model.producer_name, model.producer_version) if part),
        ir_version=model.ir_version,
        opsets=dict(sorted(model.opset_imports.items())),
        ops=op_counts(model),
        parameters=_count_parameters(model),
        weights=_weights_by_dtype(model),
        inputs=tuple(_port(v) for v in model.graph.inputs if not v.is_initializer()),
        outputs=tuple(_port(v) for v in model.graph.outputs),
        functions=_functions(model),
        files=_files(model, path, manifest),
        target=manifest.target if manifest else None,
        quantization=manifest.quantization if manifest else {},
        passes=manifest.passes if manifest else (),
    )


def op_name(node: ir.Node) -> str:
    """Return the operator of a node, with its domain in front when it is not the standard one."""
    return node.op_type if node.domain in STANDARD_DOMAINS else f"{node.domain}::{node.op_type}"


def op_counts(model: ir.Model) -> dict[str, int]:
    """Count the nodes of the graph and its subgraphs by operator, most frequent first."""
    counts = Counter(op_name(node) for node in model.graph.all_nodes())
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def initializers(model: ir.Model) -> Iterator[ir.Value]:
    """Yield the initializers that have a value, of the graph and its subgraphs."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value


def shape_of(shape: ir.ShapeProtocol | None) -> tuple[int | str | None, ...] | None:
    """Return the dims of a shape as numbers, symbols or None."""
    if shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else dim.value for dim in shape)


def _weights_by_dtype(model: ir.Model) -> dict[str, DtypeTotal]:
    totals: dict[str, DtypeTotal] = {}
    seen: set[object] = set()
    for value in initializers(model):
        tensor = value.const_value
        assert tensor is not None
        key = initializer_key(tensor)
        if key in seen:
            continue
        seen.add(key)
        total = totals.setdefault(dtype_name(tensor.dtype), DtypeTotal())
        total.tensors += 1
        total.elements += math.prod(tensor.shape.numpy())
        total.size_bytes += tensor.nbytes if tensor.dtype != ir.DataType.STRING else 0
    return dict(sorted(totals.items(), key=lambda item: -item[1].size_bytes))


def _count_parameters(model: ir.Model) -> int:
    seen: set[object] = set()
    parameters = 0
    for value in initializers(model):
        tensor = value.const_value
        assert tensor is not None
        key = initializer_key(tensor)
        if key not in seen:
            seen.add(key)
            parameters += _parameters_of(value, tensor)
    return parameters


def _parameters_of(value: ir.Value, tensor: ir.TensorProtocol) -> int:
    uses = [(node, index) for node, index in value.uses() if node.domain != "" or node.op_type != "Identity"]
    if uses and all(index in _NOT_PARAMETERS.get(node.op_type, ()) for node, index in uses):
        return 0
    for node, index in uses:
        if node.op_type == "MatMulNBits" and index == 1:
            return node.attributes.get_int("K", 0) * node.attributes.get_int("N", 0)
    elements = math.prod(tensor.shape.numpy())
    if any("W4" in node.op_type and index == 1 for node, index in uses):
        return 2 * elements  # two codes in a byte
    is_weight = tensor.dtype.is_floating_point() or _is_quantized(uses)
    return elements if is_weight and elements > 1 else 0


def _is_quantized(uses: list[tuple[ir.Node, int]]) -> bool:
    """Whether an integer initializer is a quantized weight, by the operator that takes it."""
    weight_inputs = {
        "DequantizeLinear": 0,
        "GatherBlockQuantized": 0,
        **dict.fromkeys(QUANTIZED_LINEARS | EMBEDDINGS, 1),
    }
    return any(
        weight_inputs.get(node.op_type, 1 if "MatMul" in node.op_type else None) == index for node, index in uses
    )


def initializer_key(tensor: ir.TensorProtocol) -> object:
    """Return what tells two initializers apart: tensors that share their bytes share it."""
    if isinstance(tensor, MappedTensor) and tensor.nbytes:
        return (id(tensor.file), tensor.offset, tensor.dtype, tuple(tensor.shape.numpy()))
    return id(tensor)


def dtype_name(dtype: ir.DataType | None) -> str:
    """Return a dtype as NumPy spells it: `float32`, `bfloat16`, `int4`."""
    if dtype is None:
        return "unknown"
    return _FLOAT_NAMES.get(dtype, dtype.name.lower())


def _port(value: ir.Value) -> GraphPort:
    is_plain = value.type is None or isinstance(value.type, ir.TensorType)
    dtype = dtype_name(value.dtype) if is_plain else str(value.type)
    return GraphPort(value.name or "", dtype, shape_of(value.shape))


def _functions(model: ir.Model) -> tuple[FunctionUse, ...]:
    calls = Counter(node.op_identifier() for node in model.graph.all_nodes())
    infos = [
        FunctionUse(function.domain, function.name, calls[identifier], len(list(function.all_nodes())))
        for identifier, function in model.functions.items()
    ]
    return tuple(sorted(infos, key=lambda f: (f.domain != DOMAIN, -f.calls, f.domain, f.name)))


def _files(model: ir.Model, path: Path, manifest: Manifest | None) -> dict[str, int]:
    files = {path.name: path.stat().st_size} if path.is_file() else {}
    for value in initializers(model):
        if isinstance(value.const_value, MappedTensor):
            file = value.const_value.file
            files.setdefault(file.path.name, file.size_bytes)
    listed: tuple[FileEntry, ...] = manifest.files if manifest else ()
    return files | {entry.name: entry.size_bytes for entry in listed}
