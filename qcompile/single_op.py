"""One standard operator at a time: evaluate it on arrays, or infer its output shapes from concrete input shapes.

Both lean on onnx itself (its reference implementation and its C++ shape inference), and both remember what they have
seen: the layers of a decoder ask the same questions again and again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import shape_inference
from onnx.reference import ReferenceEvaluator

TensorType = tuple[ir.DataType, tuple[int, ...]]

# Whose output can be much larger than their inputs.
GROWING_OPS = frozenset({"ConstantOfShape", "Expand", "EyeLike", "OneHot", "Pad", "Range", "Resize", "Tile"})
_RANDOM_OPS = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
# What onnx raises for a node that breaks its operator's rules; all mean "cannot be told".
_REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, NotImplementedError, AttributeError)
_MAX_RANGE_ELEMENTS = 1 << 40


class SingleOp:
    """One node of the standard domain, asked with concrete types and values.

    Args:
        node: The node; its inputs do not matter but for which are there.
        opset: Version of the standard operator set.
    """

    def __init__(self, node: ir.Node, opset: int) -> None:
        self.op_type = node.op_type
        self.opset = opset
        self._key = _node_key(node)
        self._has_attributes = any(a.value for a in node.attributes.values())

    def evaluate(self, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray] | None:
        """Return the outputs for these inputs, or None when the reference implementation cannot run them."""
        if self._key is None or self.op_type in _RANDOM_OPS:
            return None
        evaluator = _evaluator(self._key, self.opset)
        if evaluator is None:
            return None
        feeds = {f"i{i}": x for i, x in enumerate(inputs) if x is not None}
        try:
            with np.errstate(all="ignore"):
                outputs = self._gather_nd(inputs) or evaluator.run(None, feeds)
        except _REFUSALS:
            return None
        arrays = [np.asarray(x) for x in outputs]
        return arrays if all(a.dtype.kind != "O" for a in arrays) else None

    def _gather_nd(self, inputs: Sequence[np.ndarray | None]) -> list[np.ndarray] | None:
        """GatherND without batch dims, as torch indexes masks; the reference loops over every element."""
        data, indices = (*inputs, None, None)[:2]
        if self.op_type != "GatherND" or self._has_attributes or data is None or indices is None:
            return None
        return [data[tuple(np.moveaxis(indices, -1, 0))]]

    def infer(
        self, input_types: Sequence[TensorType | None], input_values: Sequence[np.ndarray | None]
    ) -> list[TensorType | None] | None:
        """Return dtype and concrete shape of each output, or None when onnx cannot tell.

        Args:
            input_types: Dtype and concrete shape per input; None for an absent optional input.
            input_values: The values that are known; shapes such as Reshape's need them.
        """
        if self._key is None:
            return None
        if self.op_type == "Range":
            return _range_type(input_types, input_values)
        frozen = tuple(
            None if v is None or v.dtype.kind not in "iubf" else (v.dtype.str, v.shape, v.tobytes())
            for v in input_values
        )
        return _infer(self._key, tuple(input_types), frozen, self.opset)


def _node_key(node: ir.Node) -> bytes | None:
    """A node's operator, attributes and arity as a serialized NodeProto with neutral names."""
    proto = onnx.NodeProto(op_type=node.op_type, domain="" if node.domain == "ai.onnx" else node.domain)
    proto.input.extend(f"i{i}" if v is not None else "" for i, v in enumerate(node.inputs))
    proto.output.extend(f"o{i}" if v.name != "" else "" for i, v in enumerate(node.outputs))
    for name in sorted(node.attributes):
        attribute = node.attributes[name]
        if attribute.is_ref():
            return None
        proto.attribute.append(ir.serde.serialize_attribute(attribute))
    return bytes(proto.SerializeToString(deterministic=True))


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
    except _REFUSALS:
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
    except (*_REFUSALS, onnx.defs.SchemaError, onnx.checker.ValidationError, shape_inference.InferenceError):
        return None
    return [_tensor_type(found.get(name)) if name else None for name in node.output]


def _range_type(
    input_types: Sequence[TensorType | None], input_values: Sequence[np.ndarray | None]
) -> list[TensorType | None] | None:
    """Range's length hangs on values that onnx only looks at when they are initializers."""
    first = input_types[0]
    if first is None or any(v is None or v.size != 1 for v in input_values):
        return None
    start, limit, delta = (float(v.reshape(())) for v in input_values if v is not None)
    if delta == 0 or not math.isfinite((limit - start) / delta):
        return None
    length = max(0, math.ceil((limit - start) / delta))
    return [(first[0], (length,))] if length < _MAX_RANGE_ELEMENTS else None


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
