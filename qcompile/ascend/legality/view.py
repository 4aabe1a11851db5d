"""A graph as ATC's parser meets it: nodes in order, and of every value its type, shape, constant and use."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import AttributeProto, NodeProto, TensorProto

from qcompile.ascend.legality.onnx_file import OnnxFile
from qcompile.ascend.legality.types import DTYPES, output_dtype

_SCOPES = "pkg.torch.onnx.name_scopes"
_LAYER = re.compile(r"(?:^|[./])((?:model[./])?(?:layers?|h|blocks?)[./_]\d{1,4}(?:[./][A-Za-z_][\w]*)*)")
_NUMPY = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32, "f64": np.float64, "bool": np.bool_}
_NUMPY.update({f"i{bits}": getattr(np, f"int{bits}") for bits in (8, 16, 32, 64)})
_NUMPY.update({f"u{bits}": getattr(np, f"uint{bits}") for bits in (8, 16, 32, 64)})
_MAX_SUBGRAPH_DEPTH = 16

Shape = tuple[int | None, ...]


@dataclass
class Value:
    """One tensor of the graph.

    Attributes:
        name: As in the file.
        dtype: f16, i64, ...; None when nothing says.
        shape: None for a dimension that is not a number; None for the whole when nothing says.
        is_declared: Whether the file itself (inputs, outputs, value_info, initializers) says its type.
        is_input: Whether it is a graph input without an initializer.
        is_foldable: Whether it is constant once the shapes are.
        tensor: Its constant, if it is an initializer or the output of Constant.
        producer: The node that makes it.
        readers: The nodes that take it.
    """

    name: str
    dtype: str | None = None
    shape: Shape | None = None
    is_declared: bool = False
    is_input: bool = False
    is_output: bool = False
    is_foldable: bool = False
    tensor: TensorProto | None = None
    producer: Node | None = None
    readers: list[Node] = field(default_factory=list)

    @property
    def is_static(self) -> bool:
        """Whether every dimension is a number."""
        return self.shape is not None and all(dim is not None for dim in self.shape)


@dataclass(eq=False)
class Node:
    """One node; `inputs` has None for a hole."""

    proto: NodeProto
    name: str
    inputs: list[Value | None]
    outputs: list[Value | None]
    in_subgraph: bool

    @property
    def op(self) -> str:
        """Op type."""
        return str(self.proto.op_type)

    @property
    def attributes(self) -> dict[str, Any]:
        """Numbers, strings and tuples of them by name; tensors and graphs are left out."""
        found = {a.name: attribute_value(a) for a in self.proto.attribute}
        return {name: value for name, value in found.items() if value is not None}

    def integer(self, name: str, default: int) -> int:
        """Return an integer attribute, or the default where it is absent or of another kind."""
        value = self.attributes.get(name, default)
        return value if isinstance(value, int) else default

    def input(self, index: int) -> Value | None:
        """Return an input, or None for a hole or one beyond the end."""
        return self.inputs[index] if 0 <= index < len(self.inputs) else None

    @property
    def layer(self) -> str:
        """The layer of the source model it comes from, as far as names tell."""
        scopes = next((p.value for p in self.proto.metadata_props if p.key == _SCOPES), "")
        weights = [v.name for v in self.inputs if v is not None and v.tensor is not None]
        for text in (scopes, self.proto.name, *weights, *self.proto.output):
            found = _LAYER.findall(text)
            if found:
                return str(found[-1])
        head = self.proto.name.rpartition("/")[0]
        return head.strip("/").replace("/", ".")


class GraphView:
    """The nodes of a model, those of If branches included, with what is known of their values."""

    def __init__(self, file: OnnxFile, shapes: Mapping[str, Shape] | None = None) -> None:
        self.file = file
        self.model = file.proto
        self.nodes: list[Node] = []
        self.values: dict[str, Value] = {}
        graph = self.model.graph
        self._add_graph(graph, self.values, shapes or {}, 0)
        self._spread(self._inferred(shapes or {}))
        self.inputs = [self.values[v.name] for v in graph.input if self.values[v.name].is_input]
        self.outputs = [self.values[v.name] for v in graph.output if v.name in self.values]

    def opset(self, domain: str) -> int | None:
        """Return the version imported for a domain exactly as it is spelled, the first if there are several."""
        return next((int(o.version) for o in self.model.opset_import if o.domain == domain), None)

    def constant(self, value: Value | None, max_bytes: int = 1 << 20) -> npt.NDArray[Any] | None:
        """Return the numbers of a constant of at most max_bytes, or None."""
        tensor = value.tensor if value is not None else None
        if value is None or tensor is None or value.dtype not in _NUMPY or value.shape is None:
            return None
        dtype = np.dtype(_NUMPY[value.dtype])
        count = int(np.prod([int(d or 0) for d in value.shape], dtype=object))
        if count * dtype.itemsize > max_bytes or any(d < 0 for d in tensor.dims):
            return None
        raw = self.file.bytes_of(tensor)
        if raw is None:
            try:
                return np.asarray(onnx.numpy_helper.to_array(tensor))
            except (ValueError, TypeError):
                return None
        return raw.view(dtype).reshape(tensor.dims) if raw.nbytes == count * dtype.itemsize else None

    def _add_graph(
        self, graph: onnx.GraphProto, scope: dict[str, Value], shapes: Mapping[str, Shape], depth: int
    ) -> None:
        for tensor in graph.initializer:
            dims = tuple(int(d) for d in tensor.dims)
            dtype = DTYPES.get(tensor.data_type)
            self._own(scope, Value(tensor.name, dtype, dims, True, is_foldable=True, tensor=tensor), depth)
        for info in graph.input:
            if info.name not in scope or depth:
                value = self._own(scope, _typed(info), depth)
                value.is_input = depth == 0
                value.shape = shapes.get(info.name, value.shape)
        for info in (*graph.value_info, *graph.output):
            known = scope.get(info.name)
            declared = _typed(info)
            if known is None:
                self._own(scope, declared, depth)
            elif declared.is_declared and not known.is_declared:
                known.dtype, known.shape, known.is_declared = declared.dtype, declared.shape, True
        for info in graph.output:
            scope[info.name].is_output = depth == 0
        for proto in graph.node:
            self._add_node(proto, scope, depth)

    def _own(self, scope: dict[str, Value], value: Value, depth: int) -> Value:
        scope[value.name] = value
        if depth:
            self.values.setdefault(value.name, value)
        return value

    def _add_node(self, proto: NodeProto, scope: dict[str, Value], depth: int) -> None:
        name = proto.name or f"{proto.op_type}_{len(self.nodes)}"
        inputs = [self._value(text, scope, depth) for text in proto.input]
        outputs = [self._value(text, scope, depth) for text in proto.output]
        node = Node(proto, name, inputs, outputs, in_subgraph=depth > 0)
        self.nodes.append(node)
        for value in inputs:
            if value is not None:
                value.readers.append(node)
        for value in outputs:
            if value is not None:
                value.producer = node
        if depth < _MAX_SUBGRAPH_DEPTH:
            for attribute in proto.attribute:
                for body in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                    self._add_graph(body, dict(scope), {}, depth + 1)

    def _value(self, name: str, scope: dict[str, Value], depth: int) -> Value | None:
        if not name:
            return None
        return scope[name] if name in scope else self._own(scope, Value(name), depth)

    def _inferred(self, shapes: Mapping[str, Shape]) -> dict[str, Value]:
        """Types and shapes that ONNX's own inference finds for standard operators; empty where it fails."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.model)
        for info in proto.graph.input:
            if info.name in shapes:
                dims = info.type.tensor_type.shape.dim
                for dim, size in zip(dims, shapes[info.name], strict=False):
                    dim.Clear()
                    if size is not None:
                        dim.dim_value = size
        imported = {o.domain for o in proto.opset_import}
        for domain in {node.proto.domain for node in self.nodes} - imported:  # inference stops at the first unknown one
            proto.opset_import.add(domain=domain, version=1 if domain else 16)
        try:
            inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
        except (onnx.shape_inference.InferenceError, RuntimeError, ValueError, TypeError):
            return {}
        return {info.name: _typed(info) for info in inferred.graph.value_info}

    def _spread(self, inferred: Mapping[str, Value]) -> None:
        """Fill in types, shapes and constants in the order of the nodes."""
        for node in self.nodes:
            is_constant = node.op == "Constant" and not node.proto.domain
            known = [v for v in node.inputs if v is not None]
            foldable = is_constant or (bool(known) and all(v.is_foldable for v in known))
            if node.op in {"Shape", "Size"} and known and known[0].is_static:
                foldable = True
            for index, value in enumerate(node.outputs):
                if value is not None:
                    self._fill(node, index, value, inferred.get(value.name))
                    value.is_foldable = foldable
            if is_constant and node.outputs and node.outputs[0] is not None:
                _fill_constant(node, node.outputs[0])

    def _fill(self, node: Node, index: int, value: Value, inferred: Value | None) -> None:
        if inferred is not None:
            value.dtype = value.dtype or inferred.dtype
            if value.shape is None or not value.is_static:
                value.shape = inferred.shape or value.shape
        if value.dtype is None:
            value.dtype = output_dtype(node.op, index, [v.dtype if v else None for v in node.inputs], node.attributes)

    def walk_back(self, value: Value | None, ops: frozenset[str]) -> Iterator[Node]:
        """Yield the producers behind a value, going on through nodes of the given op types by their first input."""
        while value is not None and value.producer is not None:
            yield value.producer
            if value.producer.op not in ops:
                return
            value = value.producer.input(0)


def attribute_value(attribute: AttributeProto) -> int | float | str | tuple[Any, ...] | None:
    """Return an attribute as Python has it; None for tensors, graphs and unknown kinds."""
    kind = attribute.type
    if kind == AttributeProto.STRING:
        return attribute.s.decode("utf-8", "replace")
    if kind == AttributeProto.INT:
        return int(attribute.i)
    if kind == AttributeProto.FLOAT:
        return float(attribute.f)
    if kind == AttributeProto.STRINGS:
        return tuple(text.decode("utf-8", "replace") for text in attribute.strings)
    if kind == AttributeProto.INTS:
        return tuple(attribute.ints)
    return tuple(attribute.floats) if kind == AttributeProto.FLOATS else None


def _typed(info: onnx.ValueInfoProto) -> Value:
    tensor = info.type.tensor_type
    if not info.type.HasField("tensor_type"):
        return Value(info.name)
    shape = None
    if tensor.HasField("shape"):
        shape = tuple(
            int(d.dim_value) if d.HasField("dim_value") and d.dim_value >= 0 else None for d in tensor.shape.dim
        )
    dtype = DTYPES.get(tensor.elem_type)
    return Value(info.name, dtype, shape, is_declared=dtype is not None)


def _fill_constant(node: Node, value: Value) -> None:
    for attribute in node.proto.attribute:
        if attribute.name == "value" and attribute.type == AttributeProto.TENSOR:
            value.tensor = attribute.t
            value.dtype = DTYPES.get(attribute.t.data_type)
            value.shape = tuple(int(d) for d in attribute.t.dims)
            return
        numbers = attribute_value(attribute)
        if numbers is not None and attribute.name in {"value_int", "value_ints", "value_float", "value_floats"}:
            if isinstance(numbers, str):
                return
            dtype = np.int64 if "int" in attribute.name else np.float32
            tensor = onnx.numpy_helper.from_array(np.asarray(numbers, dtype))
            value.tensor, value.dtype, value.shape = tensor, DTYPES[tensor.data_type], tuple(tensor.dims)
            return
