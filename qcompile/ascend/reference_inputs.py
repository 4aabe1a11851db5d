"""Bring the inputs of an NPU operator to the plain form that its definition is written for.

Packed scales become floats, words of eight codes become codes, a transposed weight is turned, and an optional input that is
left out becomes its neutral value.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from qcompile.ascend.lowering.quantized_weights import codes_by_column, codes_of_words, scale_of_bits
from qcompile.ascend.lowering.static_graph import dims
from qcompile.tensors import Array, StreamedTensor
from qcompile.weights import rows_of


def complete_inputs(graph: ir.Graph, node: ir.Node) -> None:
    """Rewrite the inputs of one node in a copy of a lowered graph."""
    completion = _COMPLETIONS.get(node.op_type)
    if completion is not None:
        completion(graph, node)


def _dequant(graph: ir.Graph, node: ir.Node) -> None:
    _decode_scale(graph, node, 1)


def _quant_v2(graph: ir.Graph, node: ir.Node) -> None:
    if len(node.inputs) < 3 or node.inputs[2] is None:
        node.resize_inputs(3)
        node.replace_input_with(2, _number(graph, "reference.zero", np.zeros(1, np.float32)))


def _quant_matmul(graph: ir.Graph, node: ir.Node) -> None:
    _decode_scale(graph, node, 2)
    if "transpose_x2" in node.attributes and node.attributes["transpose_x2"].as_int():
        tensor = _constant(node, 1)
        _replace(graph, node, 1, codes_by_column(tensor), "turned")
    rows = dims(node.outputs[0])[0]
    inputs = list(node.inputs) + [None] * (6 - len(node.inputs))
    zero = _number(graph, "reference.zero", np.zeros(1, np.float32))
    ones = _number(graph, f"reference.ones.{rows}", np.ones(rows, np.float32))
    node.resize_inputs(5)
    for index, value in enumerate((*inputs[:3], inputs[4] or zero, inputs[5] or ones)):
        node.replace_input_with(index, value)


def _weight_only(graph: ir.Graph, node: ir.Node) -> None:
    tensor = _constant(node, 1)
    if tensor.dtype == ir.DataType.INT32:

        def rows(start: int, stop: int) -> Array:
            return codes_of_words(rows_of(tensor, start, stop))

        m, words = (int(d) for d in tensor.shape.numpy())
        _replace(graph, node, 1, StreamedTensor(rows, ir.DataType.INT8, ir.Shape([m, 8 * words])), "codes")
    if len(node.inputs) < 4:
        node.resize_inputs(4)
        shape = _constant(node, 2).shape.numpy()
        node.replace_input_with(3, _number(graph, f"reference.zeros.{shape}", np.zeros(shape, np.float32)))


def _fused_attention(graph: ir.Graph, node: ir.Node) -> None:
    """The definition returns [B, H, S, d]; the layout BNSD_BSND is that turned to [B, S, H, d]."""
    if node.attributes["input_layout"].as_string() != "BNSD_BSND":
        return
    output = node.outputs[0]
    b, s, h, d = dims(output)
    turn = ir.node("Transpose", [output], {"perm": [0, 2, 1, 3]}, name=f"{node.name}.by_row")
    turned = turn.outputs[0]
    turned.name, turned.type, turned.shape = turn.name, ir.TensorType(ir.DataType.FLOAT), output.shape
    ir.convenience.replace_all_uses_with(output, turned, replace_graph_outputs=True)
    turn.replace_input_with(0, output)
    output.shape = ir.Shape((b, h, s, d))
    graph.insert_after(node, turn)


def _decode_scale(graph: ir.Graph, node: ir.Node, index: int) -> None:
    tensor = _constant(node, index)
    if tensor.dtype == ir.DataType.UINT64:
        _replace(graph, node, index, ir.Tensor(scale_of_bits(tensor.numpy())), "plain")


def _constant(node: ir.Node, index: int) -> ir.TensorProtocol:
    value = node.inputs[index]
    assert value is not None
    assert value.const_value is not None
    return value.const_value


def _replace(graph: ir.Graph, node: ir.Node, index: int, tensor: ir.TensorProtocol, what: str) -> None:
    old = node.inputs[index]
    assert old is not None
    node.replace_input_with(index, _initializer(graph, f"{old.name}.{what}", tensor))


def _number(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    return graph.initializers.get(name) or _initializer(graph, name, ir.Tensor(array))


def _initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()))
    value.const_value = tensor
    graph.register_initializer(value)
    return value


_COMPLETIONS: dict[str, Callable[[ir.Graph, ir.Node], None]] = {
    "AscendDequant": _dequant,
    "NPUFusedInferAttentionScore": _fused_attention,
    "NPUAscendQuantV2": _quant_v2,
    "QuantBatchMatMul": _quant_matmul,
    "NPUWeightQuantBatchMatmulV2": _weight_only,
}
