"""One standard operator at a time: evaluate it on arrays, or infer its output shapes from concrete input shapes.

Both lean on onnx itself (its reference implementation and its C++ shape inference), and both remember what they have
seen: the layers of a decoder ask the same questions again and again.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import shape_inference
from onnx.reference import ReferenceEvaluator

TensorType = tuple[ir.DataType, tuple[int, ...]]

_RANDOM_OPS = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}


def evaluate(node: ir.Node, inputs: Sequence[np.ndarray | None], opset: int) -> list[np.ndarray] | None:
    """Run one node on arrays and return its outputs, or None when the reference cannot run it."""
    if node.op_type in _RANDOM_OPS:
        return None
    key = _node_key(node, [x is not None for x in inputs])
    evaluator = _evaluator(key, opset)
    if evaluator is None:
        return None
    feeds = {f"i{i}": x for i, x in enumerate(inputs) if x is not None}
    try:
        with np.errstate(all="ignore"):
            outputs = evaluator.run(None, feeds)
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, AttributeError):
        return None
    return [np.asarray(x) for x in outputs]


def infer(
    node: ir.Node,
    input_types: Sequence[TensorType | None],
    input_values: Sequence[np.ndarray | None],
    opset: int,
) -> list[TensorType | None] | None:
    """Return dtype and concrete shape of each output, or None when onnx cannot tell.

    Args:
        node: A node of the standard domain.
        input_types: Dtype and concrete shape per input; None for an absent optional input.
        input_values: The values that are known; shapes such as Reshape's need them.
        opset: Version of the standard operator set.
    """
    key = _node_key(node, [t is not None for t in input_types])
    frozen = tuple(
        None if v is None or v.dtype.kind not in "iubf" else (v.dtype.str, v.shape, v.tobytes()) for v in input_values
    )
    return _infer(key, tuple(input_types), frozen, opset)


def _node_key(node: ir.Node, present: Sequence[bool]) -> bytes:
    """A node's operator, attributes and arity as a serialized NodeProto with neutral names."""
    proto = onnx.NodeProto(op_type=node.op_type, domain="" if node.domain == "ai.onnx" else node.domain)
    proto.input.extend(f"i{i}" if there else "" for i, there in enumerate(present))
    proto.output.extend(f"o{i}" if v.name != "" else "" for i, v in enumerate(node.outputs))
    for name in sorted(node.attributes):
        attribute = node.attributes[name]
        proto.attribute.append(ir.serde.serialize_attribute(attribute))
    return proto.SerializeToString(deterministic=True)


@functools.lru_cache(maxsize=4096)
def _evaluator(key: bytes, opset: int) -> ReferenceEvaluator | None:
    node = onnx.NodeProto.FromString(key)
    unknown = onnx.TypeProto()
    graph = onnx.GraphProto(
        name="single",
        node=[node],
        input=[onnx.ValueInfoProto(name=name, type=unknown) for name in node.input if name],
        output=[onnx.ValueInfoProto(name=name, type=unknown) for name in node.output if name],
    )
    model = onnx.ModelProto(
        ir_version=10, graph=graph, opset_import=[onnx.OperatorSetIdProto(domain="", version=opset)]
    )
    try:
        return ReferenceEvaluator(model)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, KeyError):
        return None


@functools.lru_cache(maxsize=65536)
def _infer(
    key: bytes, input_types: tuple[TensorType | None, ...], frozen: tuple[Any, ...], opset: int
) -> list[TensorType | None] | None:
    node = onnx.NodeProto.FromString(key)
    types = {f"i{i}": _type_proto(t) for i, t in enumerate(input_types) if t is not None}
    data = {}
    for i, entry in enumerate(frozen):
        if entry is not None:
            dtype, shape, raw = entry
            data[f"i{i}"] = onnx.numpy_helper.from_array(np.frombuffer(raw, dtype).reshape(shape), f"i{i}")
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
        found = shape_inference.infer_node_outputs(
            schema, node, types, data, opset_imports=[onnx.OperatorSetIdProto(domain="", version=opset)]
        )
    except (RuntimeError, ValueError, onnx.defs.SchemaError, shape_inference.InferenceError):
        return None
    return [_tensor_type(found.get(name)) for name in node.output]


def _type_proto(tensor_type: TensorType) -> onnx.TypeProto:
    dtype, shape = tensor_type
    proto = onnx.TypeProto()
    proto.tensor_type.elem_type = int(dtype)
    proto.tensor_type.shape.dim.extend(onnx.TensorShapeProto.Dimension(dim_value=d) for d in shape)
    return proto


def _tensor_type(proto: onnx.TypeProto | None) -> TensorType | None:
    if proto is None or not proto.tensor_type.HasField("shape"):
        return None
    dims = proto.tensor_type.shape.dim
    if any(not d.HasField("dim_value") for d in dims):
        return None
    return ir.DataType(proto.tensor_type.elem_type), tuple(d.dim_value for d in dims)
