"""What an ONNX file must keep to before a pass looks at it; a file that breaks a rule is refused in one line.

Every value that is read is given by one node, input or initializer; no nodes read each other in a circle; tensors inside
the file hold as many bytes as their type and shape say; calls of fused operators have their inputs and attributes.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.descriptor import FieldDescriptor  # type: ignore[import-untyped]
from google.protobuf.message import Message  # type: ignore[import-untyped]

from qcompile.errors import GraphError
from qcompile.functions import DOMAIN, FUSED_OPS

_STANDARD = {"", "ai.onnx"}
_TEXTS_AND_MESSAGES = {FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_MESSAGE}
_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")


def tensors_of(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor of a model: initializers and attributes, in subgraphs and functions too."""
    graphs = [proto.graph]
    nodes = [node for function in proto.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            nodes.extend(graph.node)
            yield from graph.initializer
        for node in nodes:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
                graphs.extend(attribute.graphs)
                if attribute.HasField("g"):
                    graphs.append(attribute.g)
        nodes = []


def check_texts(message: Message, path: Path) -> None:
    """Refuse names that are not UTF-8: protobuf gives bytes for them, and everybody expects text."""
    if isinstance(message, onnx.TensorProto):  # its other fields are data
        fields: list[tuple[str, object]] = [("name", message.name)]
    else:
        fields = [(field.name, value) for field, value in message.ListFields() if field.type in _TEXTS_AND_MESSAGES]
    for name, value in fields:
        for each in value if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else (value,):
            if isinstance(each, Message):
                check_texts(each, path)
            elif isinstance(each, bytes):
                raise GraphError(f"{path}: the {name} {each[:80]!r} is not UTF-8; export it again")


def check_tensor(tensor: onnx.TensorProto, path: Path) -> None:
    """Check the data of a tensor that lies inside the file against its type and shape."""
    where = f"{path}: tensor '{tensor.name}'"
    if any(dim < 0 for dim in tensor.dims):
        raise GraphError(f"{where} has shape {list(tensor.dims)}; dimensions are not negative: export it again")
    if tensor.external_data or tensor.data_type == onnx.TensorProto.UNDEFINED:
        return
    dtype, size = ir.DataType(tensor.data_type), math.prod(tensor.dims)
    if dtype != ir.DataType.STRING and tensor.HasField("raw_data"):
        seen, wanted, unit = len(tensor.raw_data), (size * dtype.bitwidth + 7) // 8, "bytes"
    else:
        per_entry = 8 // dtype.bitwidth if dtype != ir.DataType.STRING and dtype.bitwidth < 8 else 1
        per_element = 2 if dtype in {ir.DataType.COMPLEX64, ir.DataType.COMPLEX128} else 1
        seen = max(len(getattr(tensor, name)) for name in _FIELDS)
        wanted, unit = -(-size * per_element // per_entry), "elements"
    if seen != wanted:
        raise GraphError(
            f"{where} has {seen} {unit}, its type {dtype.name} and shape {list(tensor.dims)} need {wanted}; export it again"
        )


def check_graph(model: ir.Model, path: Path) -> None:
    """Check how values, nodes and calls hang together, and put every node behind those it reads."""
    imports = model.graph.opset_imports
    if not _STANDARD & imports.keys() and any(n.domain in _STANDARD for n in model.graph.all_nodes()):
        raise GraphError(f"{path}: it uses standard operators and imports {', '.join(imports)} only; export it again")
    _check_interface(model.graph, path)
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        for node in graph.all_nodes():
            _check_node(node, model, path)
        try:
            graph.sort()
        except ValueError:
            raise GraphError(f"{path}: nodes of '{graph.name}' read each other in a circle; export it again") from None


def _check_interface(graph: ir.Graph, path: Path) -> None:
    for name, count in Counter(v.name for v in graph.inputs).items():
        if count > 1:
            raise GraphError(f"{path}: two inputs are named '{name}'; export it again")
    for value in graph.outputs:
        if not _is_given(value):
            raise GraphError(f"{path}: no node gives the output '{value.name}'; export it again")


def _check_node(node: ir.Node, model: ir.Model, path: Path) -> None:
    where = f"{path}: node '{node.name}' ({node.op_type})"
    if not node.op_type:
        raise GraphError(f"{path}: node '{node.name}' has no operator type; export it again")
    for value in node.inputs:
        if value is not None and not _is_given(value):
            raise GraphError(
                f"{where} reads '{value.name}', which no node, input or initializer gives; export it again"
            )
    opset = model.graph.opset_imports.get("", 0)
    op = FUSED_OPS.get(node.op_type) if node.domain == DOMAIN else None
    function = model.functions.get(node.op_identifier())
    if node.domain in _STANDARD:
        _check_attributes(node, _attribute_types(node.op_type, opset), where)
    elif op is not None and (function is None or op.is_defined_by(function)):
        _check_call(node, op.proto(opset), where)


def _check_attributes(node: ir.Node, types: Mapping[str, ir.AttributeType], where: str) -> None:
    for name, attribute in node.attributes.items():
        wanted = types.get(name)
        if wanted is not None and not attribute.is_ref() and attribute.type != wanted:
            raise GraphError(
                f"{where}: attribute {name} is {attribute.type.name}, the operator takes {wanted.name}; export it again"
            )


@functools.lru_cache(maxsize=1024)
def _attribute_types(op_type: str, opset: int) -> dict[str, ir.AttributeType]:
    try:
        schema = onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return {}
    # The enumeration of the schemas has the names of the other one: AttrType.INT.
    names = {name: str(attribute.type).rpartition(".")[2] for name, attribute in schema.attributes.items()}
    return {name: ir.AttributeType[kind] for name, kind in names.items()}


def _check_call(node: ir.Node, definition: onnx.FunctionProto, where: str) -> None:
    references = (a for n in definition.node for a in n.attribute if a.ref_attr_name)
    _check_attributes(node, {a.ref_attr_name: ir.AttributeType(a.type) for a in references}, where)
    missing = [name for name in definition.attribute if name not in node.attributes]
    if missing:
        raise GraphError(f"{where} has no attribute {missing[0]}; export or optimize the model again")
    num_inputs = sum(v is not None for v in node.inputs)
    if num_inputs != len(definition.input) or len(node.outputs) > len(definition.output):
        seen = f"{num_inputs} inputs and {len(node.outputs)} outputs"
        wanted = f"{len(definition.input)} and {len(definition.output)}"
        raise GraphError(f"{where} has {seen}, the operator {wanted}; export or optimize the model again")


def _is_given(value: ir.Value) -> bool:
    return value.producer() is not None or value.is_graph_input() or value.is_initializer()
