"""Quantize the weights of all projections to int8, one scale per block of the input dimension (W8A16).

    MatMul(x, W)       -> LinearW8(x, q, scales)             W [M, N] float -> q [N, M] int8, scales [N, M / block]
    Linear(x, W, b)    -> LinearW8(x, q, scales) + b
    MatMul(x, E^T)     -> LinearW8(x, q, scales)             a tied head; the embedding table itself stays float here

Symmetric round-to-nearest (`qcompile.quant.rtn`). The weights are quantized row by row while the model is saved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.functions import DOMAIN, DOMAIN_VERSION
from qcompile.passes.base import Pass, PassContext, PassResult, Rejection
from qcompile.passes.change import finish_rewrites, node_label
from qcompile.quant import WeightScheme, weight_quantizer
from qcompile.quant.scheme import ScaleType
from qcompile.tensors import StreamedTensor
from qcompile.weights import columns_of, rows_of

BLOCK_SIZES = (128, 64, 32, 16)
_SCALE_TYPES: dict[ir.DataType, ScaleType] = {ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}
RowsOfOutputs = Callable[[int, int], np.ndarray]


@dataclass(frozen=True)
class _Projection:
    """A weight to quantize, read as rows of outputs: `rows(start, stop)` is float [stop - start, M]."""

    node: ir.Node
    name: str
    num_outputs: int
    num_inputs: int
    dtype: ir.DataType
    rows: RowsOfOutputs


class QuantizeInt8(Pass):
    """Int8 weights, float activations.

    Args:
        block_size: Elements per scale; None takes the largest of 128, 64, 32, 16 that divides the input dimension.
    """

    name = "int8-weight"
    summary = "projections -> int8 weights with one scale per block (W8A16)"

    def __init__(self, block_size: int | None = None) -> None:
        self.block_size = block_size

    def call(self, context: PassContext, result: PassResult) -> None:
        """Quantize every projection; those whose input dimension has no fitting block stay float, with the reason."""
        tensors = []
        for node in list(context.model.graph):
            projection = _projection(node)
            if projection is None:
                continue
            result.matches += 1
            block_size = self._block_size(projection.num_inputs)
            if block_size is None:
                reason = f"input dimension {projection.num_inputs} is not divisible by {self.block_size or BLOCK_SIZES}"
                result.rejected.append(Rejection(node_label(node), self.name, reason))
                continue
            _quantize(context.model.graph, projection, block_size)
            tensors.append({"name": projection.name, "bits": 8, "block_size": block_size})
            result.rewrites += 1
        result.detail["quantized"] = tensors
        if result.rewrites:
            context.forget_analysis()
            finish_rewrites(context)

    def _block_size(self, num_inputs: int) -> int | None:
        sizes = BLOCK_SIZES if self.block_size is None else (self.block_size,)
        return next((size for size in sizes if num_inputs % size == 0), None)


def _projection(node: ir.Node) -> _Projection | None:
    if (node.domain, node.op_type) not in {("", "MatMul"), (DOMAIN, "Linear")}:
        return None
    weight = node.inputs[1]
    if weight is None:
        return None
    if weight.const_value is not None and len(weight.const_value.shape) == 2:
        tensor = weight.const_value
        num_inputs, num_outputs = (int(d) for d in tensor.shape.numpy())

        def by_columns(start: int, stop: int) -> np.ndarray:
            return columns_of(tensor, start, stop)

        return _Projection(node, weight.name or node_label(node), num_outputs, num_inputs, tensor.dtype, by_columns)
    transpose = weight.producer()
    source = transpose.inputs[0] if transpose is not None and transpose.op_type == "Transpose" else None
    if source is None or source.const_value is None or len(source.const_value.shape) != 2:
        return None
    table = source.const_value
    num_outputs, num_inputs = (int(d) for d in table.shape.numpy())

    def by_rows(start: int, stop: int) -> np.ndarray:
        return rows_of(table, start, stop)

    return _Projection(node, f"{node_label(node)}.weight", num_outputs, num_inputs, table.dtype, by_rows)


def _quantize(graph: ir.Graph, projection: _Projection, block_size: int) -> None:
    p = projection
    scheme = WeightScheme(8, block_size, scale_type=_SCALE_TYPES.get(p.dtype, "float32"))
    quantize = weight_quantizer(scheme, name=p.name)

    def scales(start: int, stop: int) -> np.ndarray:
        return quantize(p.rows(start, stop)).scales.astype(p.dtype.numpy())

    def quantized(start: int, stop: int) -> np.ndarray:
        return quantize(p.rows(start, stop)).codes

    shapes = ir.Shape([p.num_outputs, p.num_inputs]), ir.Shape([p.num_outputs, p.num_inputs // block_size])
    # A piece of q is four times smaller than the float rows it is made from: ask for small pieces.
    q = StreamedTensor(quantized, ir.DataType.INT8, shapes[0], name=f"{p.name}.q8", piece_bytes=8 << 20)
    s = StreamedTensor(scales, p.dtype, shapes[1], name=f"{p.name}.scales", piece_bytes=1 << 18)
    values = [ir.Value(name=t.name, type=ir.TensorType(t.dtype), shape=t.shape, const_value=t) for t in (q, s)]
    for value in values:
        graph.register_initializer(value)
    inputs = [p.node.inputs[0], *values]
    linear = ir.node("LinearW8", inputs, {"block_size": block_size}, domain=DOMAIN, name=p.node.name)
    new_nodes, output = [linear], linear.outputs[0]
    output.type = p.node.outputs[0].type
    if p.node.op_type == "Linear":
        add = ir.node("Add", [output, p.node.inputs[2]], name=f"{p.node.name}.bias")
        new_nodes.append(add)
        output = add.outputs[0]
    output.type, output.shape = p.node.outputs[0].type, p.node.outputs[0].shape
    ir.convenience.replace_nodes_and_values(graph, p.node, [p.node], new_nodes, p.node.outputs, [output])
    graph.opset_imports.setdefault(DOMAIN, DOMAIN_VERSION)
