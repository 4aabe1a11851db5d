"""Lower quantized projections to MatMulNBits, and a tied head to a Gemm that reads the embedding table in place.

    LinearW8(x, q, scales)         -> MatMulNBits(x, q + 128, scales), 8 bits, accuracy_level 4
    MatMul(x [B,1,D], E^T)         -> Gemm(x, E, transB = 1): no transposed copy of the table is made at load

accuracy_level 4 quantizes the activations of each row to int8 inside the kernel. Level 0 keeps them float but runs 100
times slower (736 ms against 4.6 ms for a 152k vocabulary), so it is no choice; the proof's limit says what level 4 costs.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.functions import DOMAIN
from qcompile.passes.base import Pass, PassContext, PassResult, Rejection
from qcompile.passes.change import detach, finish_rewrites, named_constant, node_label
from qcompile.passes.lower_to_ort import MICROSOFT
from qcompile.passes.proof import Prover, Rewrite
from qcompile.tensors import StreamedTensor
from qcompile.weights import rows_of

ACCURACY_LEVEL = 4
# Activations rounded to 8 bits per block: measured up to 0.018 of the largest output on random normal rows, 24 layers.
MAX_RELATIVE_ERROR = 5e-2
_ZERO_POINT = 128
_PROVED_ROWS = 256


class LowerWeightsToOrt(Pass):
    """Quantized projections and the tied head."""

    name = "lower-weights-to-ort"
    summary = "LinearW8 -> MatMulNBits; tied head -> Gemm on the embedding table"

    def call(self, context: PassContext, result: PassResult) -> None:
        """Lower each, prove it with a limit for int8 activations, keep the function where the proof fails."""
        for node in list(context.model.graph):
            if (node.domain, node.op_type) == (DOMAIN, "LinearW8"):
                _lower_linear(context, result, node)
            elif node.op_type == "MatMul" and _tied_table(node) is not None:
                _lower_tied_head(context, result, node)
        if result.rewrites:
            finish_rewrites(context)


def _lower_linear(context: PassContext, result: PassResult, node: ir.Node) -> None:
    result.matches += 1
    x, weight, scales = node.inputs
    assert x is not None
    assert weight is not None
    assert scales is not None
    block_size = node.attributes["block_size"].as_int()
    if context.prover is not None:
        few = [_first_rows(value) for value in (weight, scales)]
        old = ir.node("LinearW8", [x, *few], node.attributes, domain=DOMAIN)
        new = _kernel(x, few[0], _unsigned(few[0], block_size), few[1], block_size)
        prover = Prover(context.prover.seed, MAX_RELATIVE_ERROR, embeds_weights=True)
        if not _is_proved(Rewrite([old], old.outputs, [new], new.outputs), prover, context, result, node):
            return
    stored = _unsigned(weight, block_size)
    kernel = _kernel(x, weight, stored, scales, block_size)
    kernel.name = node.name
    context.model.graph.register_initializer(stored)
    _replace(context, node, [kernel], kernel.outputs[0])
    result.rewrites += 1


def _kernel(x: ir.Value, weight: ir.Value, stored: ir.Value, scales: ir.Value, block_size: int) -> ir.Node:
    num_outputs, num_inputs = _matrix_shape(weight)
    attributes = {"K": num_inputs, "N": num_outputs, "bits": 8, "block_size": block_size}
    attributes["accuracy_level"] = ACCURACY_LEVEL
    return ir.node("MatMulNBits", [x, stored, scales], attributes, domain=MICROSOFT)


def _is_proved(rewrite: Rewrite, prover: Prover, context: PassContext, result: PassResult, node: ir.Node) -> bool:
    """Prove a rewrite on nodes made for the purpose; disconnect them, count, and report a refusal."""
    try:
        proof = prover.prove(rewrite, context.analysis)
    finally:
        detach([*rewrite.old_nodes, *rewrite.new_nodes])
    if not proof.holds:
        result.rejected.append(Rejection(node_label(node), LowerWeightsToOrt.name, f"rolled back: {proof.reason}"))
        return False
    result.proved += 1
    result.max_error = max(result.max_error, proof.error)
    return True


def _first_rows(value: ir.Value) -> ir.Value:
    """Return a constant with the first rows of a weight: output rows are independent, these stand for all."""
    assert value.const_value is not None
    array = rows_of(value.const_value, 0, min(_PROVED_ROWS, _matrix_shape(value)[0]))
    tensor = ir.tensor(np.ascontiguousarray(array))
    return ir.Value(
        name=f"{value.name}.first",
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(array.shape),
        const_value=tensor,
    )


def _matrix_shape(value: ir.Value) -> tuple[int, int]:
    assert value.const_value is not None
    rows, columns = (int(d) for d in value.const_value.shape.numpy())
    return rows, columns


def _unsigned(weight: ir.Value, block_size: int) -> ir.Value:
    """Return uint8 [N, blocks, block_size] = q + 128, the kernel's storage with its default zero point."""
    tensor = weight.const_value
    assert tensor is not None
    num_outputs, num_inputs = _matrix_shape(weight)
    num_blocks = num_inputs // block_size

    def rows(start: int, stop: int) -> np.ndarray:
        signed = rows_of(tensor, start, stop)
        return (signed.view(np.uint8) ^ np.uint8(_ZERO_POINT)).reshape(stop - start, num_blocks, block_size)

    shape = ir.Shape([num_outputs, num_blocks, block_size])
    stored = StreamedTensor(rows, ir.DataType.UINT8, shape, name=f"{weight.name}.u8", piece_bytes=8 << 20)
    return ir.Value(name=stored.name, type=ir.TensorType(stored.dtype), shape=shape, const_value=stored)


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
        few = _first_rows(table)
        transpose = ir.node("Transpose", [few], {"perm": [1, 0]})
        matmul = ir.node("MatMul", [x, transpose.outputs[0]])
        new = _gemm(context.model.graph, x, few)
        rewrite = Rewrite([transpose, matmul], matmul.outputs, new, new[-1].outputs)
        if not _is_proved(rewrite, context.prover, context, result, node):
            return
    nodes = _gemm(context.model.graph, x, table)
    for new_node in nodes:
        new_node.name = node.name if new_node.op_type == "Gemm" else f"{node.name}.{new_node.op_type}"
    _replace(context, node, nodes, nodes[-1].outputs[0])
    result.rewrites += 1


def _gemm(graph: ir.Graph, x: ir.Value, table: ir.Value) -> list[ir.Node]:
    """Return the nodes of x @ table^T; Gemm takes matrices only. The last node gives [B, S, V]."""
    vocabulary, hidden = _matrix_shape(table)
    flat = named_constant(graph, f"shape.restx{hidden}", np.array([-1, hidden], dtype=np.int64))
    split = named_constant(graph, f"dim.{vocabulary}", np.array([vocabulary], dtype=np.int64))
    rows = ir.node("Reshape", [x, flat])
    gemm = ir.node("Gemm", [rows.outputs[0], table], {"transB": 1})
    leading = ir.node("Shape", [x], {"start": 0, "end": 2})
    shape = ir.node("Concat", [leading.outputs[0], split], {"axis": 0})
    return [rows, gemm, leading, shape, ir.node("Reshape", [gemm.outputs[0], shape.outputs[0]])]


def _replace(context: PassContext, node: ir.Node, new_nodes: list[ir.Node], output: ir.Value) -> None:
    graph, old = context.model.graph, node.outputs[0]
    output.type, output.shape = old.type, old.shape
    context.analysis.alias(output, old)
    ir.convenience.replace_nodes_and_values(graph, node, [node], new_nodes, node.outputs, [output])
    graph.opset_imports.setdefault(MICROSOFT, 1)
