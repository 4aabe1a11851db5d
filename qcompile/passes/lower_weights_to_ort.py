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
from qcompile.passes.change import finish_rewrites, named_constant, node_label
from qcompile.passes.lower_to_ort import MICROSOFT
from qcompile.passes.proof import Prover, Rewrite
from qcompile.tensors import StreamedTensor
from qcompile.weights import rows_of

ACCURACY_LEVEL = 4
# Activations rounded to 8 bits per block of the kernel: half a step of 1/127 of the largest, averaged over a dot product.
MAX_RELATIVE_ERROR = 2e-2
_ZERO_POINT = 128


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
    assert weight is not None
    assert weight.const_value is not None
    num_outputs, num_inputs = (int(d) for d in weight.const_value.shape.numpy())
    block_size = node.attributes["block_size"].as_int()
    stored = _unsigned(weight, num_outputs, num_inputs // block_size, block_size)
    attributes = {"K": num_inputs, "N": num_outputs, "bits": 8, "block_size": block_size}
    attributes["accuracy_level"] = ACCURACY_LEVEL
    kernel = ir.node("MatMulNBits", [x, stored, scales], attributes, domain=MICROSOFT, name=node.name)
    kernel.outputs[0].type, kernel.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
    rewrite = Rewrite([node], node.outputs, [kernel], kernel.outputs)
    if context.prover is not None:
        proof = Prover(context.prover.seed, MAX_RELATIVE_ERROR).prove(rewrite, context.analysis)
        if not proof.holds:
            result.rejected.append(Rejection(node_label(node), "MatMulNBits", f"rolled back: {proof.reason}"))
            kernel.replace_input_with(0, None)
            return
        result.proved += 1
        result.max_error = max(result.max_error, proof.error)
    context.model.graph.register_initializer(stored)
    context.analysis.alias(kernel.outputs[0], node.outputs[0])
    _replace(context, node, [kernel], kernel.outputs[0])
    result.rewrites += 1


def _unsigned(weight: ir.Value, num_outputs: int, num_blocks: int, block_size: int) -> ir.Value:
    """Return uint8 [N, blocks, block_size] = q + 128, the kernel's storage with its default zero point."""
    tensor = weight.const_value
    assert tensor is not None

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
    graph = context.model.graph
    vocabulary, hidden = (int(d) for d in table.const_value.shape.numpy())  # type: ignore[union-attr]
    flat = named_constant(graph, f"shape.restx{hidden}", np.array([-1, hidden], dtype=np.int64))
    rows = ir.node("Reshape", [x, flat], name=f"{node.name}.rows")
    gemm = ir.node("Gemm", [rows.outputs[0], table], {"transB": 1}, name=node.name)
    leading = ir.node("Shape", [x], {"start": 0, "end": 2}, name=f"{node.name}.leading")
    last = named_constant(graph, f"dim.{vocabulary}", np.array([vocabulary], dtype=np.int64))
    shape = ir.node("Concat", [leading.outputs[0], last], {"axis": 0}, name=f"{node.name}.shape")
    logits = ir.node("Reshape", [gemm.outputs[0], shape.outputs[0]], name=f"{node.name}.logits")
    logits.outputs[0].type, logits.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
    context.analysis.alias(logits.outputs[0], node.outputs[0])
    _replace(context, node, [rows, gemm, leading, shape, logits], logits.outputs[0])
    result.rewrites += 1


def _replace(context: PassContext, node: ir.Node, new_nodes: list[ir.Node], output: ir.Value) -> None:
    graph = context.model.graph
    ir.convenience.replace_nodes_and_values(graph, node, [node], new_nodes, node.outputs, [output])
    graph.opset_imports.setdefault(MICROSOFT, 1)
