"""Rules about what a node is given: values that exist and were made before it, operands of one type, sizes that agree."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import onnx

from qcompile.ascend.legality.finding import Finding
from qcompile.ascend.legality.rule import Context, ModelRule, NodeRule, about, about_model, shape_text
from qcompile.ascend.legality.types import DTYPES
from qcompile.ascend.legality.view import Node, Value
from qcompile.tensors import DataFile

_BITS = {"bool": 8, "i4": 4, "u4": 4, "f16": 16, "bf16": 16, "f32": 32, "f64": 64}
_BITS.update({f"{sign}{bits}": bits for sign in "iu" for bits in (8, 16, 32, 64)})


def made_once(context: Context, node: Node) -> Iterator[Finding]:
    """Every input is made by something, and every output by this node alone."""
    if node.in_subgraph:
        return  # a branch's names are its own
    for value in node.inputs:
        if value is not None and not _exists(value) and not _is_sparse(context, value):
            yield about(
                node,
                "input-undefined",
                "E19999",
                seen=f"the input '{value.name}', which nothing makes",
                wanted="a graph input, an initializer or another node's output",
                cure="export the graph again, or connect the input",
            )
    for value in node.outputs:
        if value is not None and (value.producer is not node or value.is_input or value.tensor is not None):
            if value.tensor is not None and node.op == "Constant":
                continue  # its own number
            yield about(
                node,
                "output-defined-twice",
                "E19999",
                seen=f"the output '{value.name}', which something else makes too",
                wanted="a name of its own",
                cure="rename one of them",
            )


def outputs_exist(context: Context) -> Iterator[Finding]:
    """Every output of the graph is made by something."""
    for value in context.view.outputs:
        if not _exists(value) and context.view.nodes:
            yield about_model(
                "input-undefined",
                "E19999",
                name=value.name,
                seen=f"the graph's output '{value.name}', which nothing makes",
                wanted="a node's output",
                cure="export the graph again, or take the output away",
            )


def weight_sizes(context: Context) -> Iterator[Finding]:
    """The bytes of an initializer are as many as its type and shape need."""
    data_files = context.view.file.data_files()
    for tensor in context.view.model.graph.initializer:
        bits, dims = _BITS.get(DTYPES.get(tensor.data_type, "")), list(tensor.dims)
        if bits is None or any(dim < 0 for dim in dims):
            continue
        needed = (math.prod(dims) * bits + 7) // 8
        stated = _stated_bytes(context, data_files, tensor, needed)
        if stated is not None and stated != needed:
            yield about_model(
                "weight-size",
                "E19999",
                name=tensor.name,
                seen=f"'{tensor.name}' with {stated} bytes for {DTYPES[tensor.data_type]} {shape_text(tuple(dims))}",
                wanted=f"{needed} bytes",
                cure="export the model again",
            )


def _stated_bytes(
    context: Context, data_files: Mapping[str, DataFile], tensor: onnx.TensorProto, needed: int
) -> int | None:
    """How many bytes the file gives an initializer; None where its numbers are not raw bytes."""
    inline = context.view.file.inline
    if tensor.name in inline:
        return inline[tensor.name][1]
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return len(tensor.raw_data) if tensor.HasField("raw_data") else None
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if "length" in entries:
        return int(entries["length"])
    rest = data_files[entries["location"]].size_bytes - int(entries.get("offset", "0"))
    return min(rest, needed)  # without a length, what follows may belong to others


def order_of_nodes(context: Context) -> Iterator[Finding]:
    """ONNX wants every node behind those whose outputs it reads."""
    nodes = [node for node in context.view.nodes if not node.in_subgraph]
    circle = _in_a_circle(nodes)
    if circle is not None:
        yield about(
            circle,
            "graph-cycle",
            "E19999",
            seen="nodes that read each other's outputs in a circle",
            wanted="a graph without one",
            cure="export the graph again",
        )
        return
    place = {node: index for index, node in enumerate(nodes)}
    for node in nodes:
        given = [(v, v.producer) for v in node.inputs if v is not None and v.producer is not None]
        late = next(((v, maker) for v, maker in given if place.get(maker, -1) > place[node]), None)
        if late is not None:
            yield about(
                node,
                "node-order",
                "E19999",
                certain=False,
                seen=f"the input '{late[0].name}', made by '{late[1].name}' further down",
                wanted="nodes behind those that they read, as ONNX has it",
                cure="sort the nodes before saving (`qcompile optimize` and onnx-graphsurgeon's toposort() do)",
            )


def _in_a_circle(nodes: Sequence[Node]) -> Node | None:
    """Return a node of a circle, or of what is behind one; None where there is none."""
    known = set(nodes)
    waits = {node: {v.producer for v in node.inputs if v is not None and v.producer in known} for node in nodes}
    ready = [node for node, producers in waits.items() if not producers]
    num_left = len(nodes)
    while ready:
        done = ready.pop()
        num_left -= 1
        for reader in {reader for value in done.outputs if value is not None for reader in value.readers}:
            producers = waits.get(reader)
            if producers is not None and done in producers:
                producers.discard(done)
                if not producers:
                    ready.append(reader)
    return next((node for node, producers in waits.items() if producers), None) if num_left else None


def _exists(value: Value) -> bool:
    return value.producer is not None or value.is_input or value.tensor is not None


def _is_sparse(context: Context, value: Value) -> bool:
    return any(tensor.values.name == value.name for tensor in context.view.model.graph.sparse_initializer)


def one_type(context: Context, node: Node) -> Iterator[Finding]:
    """Operands that ONNX wants to be of one type are: no kernel takes fp16 beside fp32."""
    schema = context.schema(node)
    if schema is None or not schema.inputs:
        return
    names = {constraint.type_param_str for constraint in schema.type_constraints}
    first: dict[str, Value] = {}
    for index, value in enumerate(node.inputs):
        if value is None or value.dtype is None or not (value.is_declared or value.tensor is not None):
            continue
        formal = schema.inputs[min(index, len(schema.inputs) - 1)]
        if formal.type_str not in names or not formal.is_homogeneous:
            continue
        other = first.setdefault(formal.type_str, value)
        if other.dtype != value.dtype:
            yield about(
                node,
                "operand-types-differ",
                "EZ3002",
                seen=f"'{other.name}' in {other.dtype} and '{value.name}' in {value.dtype}",
                wanted="one type",
                cure="store the constant in the other's type, or put a Cast in front",
            )
            return


def inner_dimension(context: Context, node: Node) -> Iterator[Finding]:
    """MatMul: the last dimension of the left is the one before last of the right."""
    if node.op not in {"MatMul", "NPUWeightQuantBatchMatmulV2"} or {"transA", "transB"} & set(node.attributes):
        return
    left, right = node.input(0), node.input(1)
    if left is None or right is None or not left.shape or not right.shape:
        return
    inner, other = left.shape[-1], right.shape[-2] if len(right.shape) > 1 else right.shape[0]
    if inner is not None and other is not None and inner != other:
        yield about(
            node,
            "matmul-shape",
            "E14001",
            seen=f"{shape_text(left.shape)} times {shape_text(right.shape)}",
            wanted="one inner dimension",
            cure="transpose the weight, or export the graph again",
        )


def reshape_count(context: Context, node: Node) -> Iterator[Finding]:
    """Reshape: as many elements behind it as in front, where both are known."""
    data, wanted = node.input(0), context.view.constant(node.input(1))
    if node.op != "Reshape" or node.proto.domain not in {"", "ai.onnx"} or data is None or wanted is None:
        return
    if not data.is_static or data.shape is None or wanted.ndim != 1:
        return
    sizes = [int(size) for size in wanted]
    why = _why_no_reshape(tuple(int(dim or 0) for dim in data.shape), sizes, bool(node.integer("allowzero", 0)))
    if why:
        yield about(
            node,
            "reshape-count",
            "E14001",
            seen=f"{shape_text(data.shape)} as [{','.join(map(str, sizes))}]: {why}",
            wanted="as many elements as the input has, one -1 at most",
            cure="correct the shape constant; -1 stands for what is left of one dimension",
        )


def _why_no_reshape(shape: tuple[int, ...], sizes: Sequence[int], allows_zero: bool) -> str:
    if sizes.count(-1) > 1 or min(sizes, default=0) < -1:
        return "more than one -1" if sizes.count(-1) > 1 else f"a size of {min(sizes)}"
    if not allows_zero and any(size == 0 and index >= len(shape) for index, size in enumerate(sizes)):
        return "a 0 copies a dimension that the input does not have"
    filled = [shape[index] if size == 0 and not allows_zero else size for index, size in enumerate(sizes)]
    count, rest = math.prod(shape), math.prod(size for size in filled if size != -1)
    if -1 in filled:
        return "" if rest and count % rest == 0 else f"{count} elements are no multiple of {rest}"
    return "" if count == rest else f"{count} elements as {rest}"


OPERAND_RULES: tuple[NodeRule, ...] = (made_once, one_type, inner_dimension, reshape_count)
OPERAND_MODEL_RULES: tuple[ModelRule, ...] = (outputs_exist, weight_sizes, order_of_nodes)
