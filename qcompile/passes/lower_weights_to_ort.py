"""Lower a tied float head to a Gemm that reads the embedding table in place.

    MatMul(x [B,1,D], E^T)         -> Gemm(x, E, transB = 1): no transposed copy of the table is made at load

Quantized projections are lowered by `lower_quantized_blocks_to_ort` and `lower_quantized_activations_to_ort`.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.passes.base import Pass, PassContext, PassResult
from qcompile.passes.change import finish_rewrites, named_constant
from qcompile.passes.kernel_rewrite import first_rows, is_proved, matrix_shape, replace
from qcompile.passes.proof import Rewrite


class LowerWeightsToOrt(Pass):
    """The tied head."""

    name = "lower-weights-to-ort"
    summary = "tied float head -> Gemm on the embedding table"

    def call(self, context: PassContext, result: PassResult) -> None:
        """Lower the head, proved like a fusion; it stays as it is where the proof fails."""
        for node in list(context.model.graph):
            if node.op_type == "MatMul" and _tied_table(node) is not None:
                _lower_tied_head(context, result, node)
        if result.rewrites:
            finish_rewrites(context)


def _tied_table(node: ir.Node) -> ir.Value | None:
    """Return the embedding table [V, D] when a MatMul reads it transposed."""
    transpose = node.inputs[1].producer() if node.inputs[1] is not None else None
    if transpose is None or transpose.op_type != "Transpose" or transpose.inputs[0] is None:
        return None
    table = transpose.inputs[0]
    is_table = table.const_value is not None and len(table.const_value.shape) == 2
    return table if is_table else None


def _lower_tied_head(context: PassContext, result: PassResult, node: ir.Node) -> None:
    """MatMul(x [B, S, D], E^T) -> Reshape, Gemm, Reshape. Exact up to the order of sums; x has few rows by then."""
    table, x = _tied_table(node), node.inputs[0]
    specs = context.analysis.specs(x) if x is not None else None
    if table is None or x is None or specs is None or len(specs[0].shape) != 3:
        return
    result.matches += 1
    if context.prover is not None:
        few = first_rows(table)
        transpose = ir.node("Transpose", [few], {"perm": [1, 0]})
        matmul = ir.node("MatMul", [x, transpose.outputs[0]])
        new = _gemm(context.model.graph, x, few)
        rewrite = Rewrite([transpose, matmul], matmul.outputs, new, new[-1].outputs)
        if not is_proved([rewrite], context.prover, context, result, node):
            return
    nodes = _gemm(context.model.graph, x, table)
    for new_node in nodes:
        new_node.name = node.name if new_node.op_type == "Gemm" else f"{node.name}.{new_node.op_type}"
    replace(context, node, nodes)
    result.rewrites += 1


def _gemm(graph: ir.Graph, x: ir.Value, table: ir.Value) -> list[ir.Node]:
    """Return the nodes of x @ table^T; Gemm takes matrices only. The last node gives [B, S, V]."""
    vocabulary, hidden = matrix_shape(table)
    flat = named_constant(graph, f"shape.restx{hidden}", np.array([-1, hidden], dtype=np.int64))
    split = named_constant(graph, f"dim.{vocabulary}", np.array([vocabulary], dtype=np.int64))
    rows = ir.node("Reshape", [x, flat])
    gemm = ir.node("Gemm", [rows.outputs[0], table], {"transB": 1})
    leading = ir.node("Shape", [x], {"start": 0, "end": 2})
    shape = ir.node("Concat", [leading.outputs[0], split], {"axis": 0})
    return [rows, gemm, leading, shape, ir.node("Reshape", [gemm.outputs[0], shape.outputs[0]])]
