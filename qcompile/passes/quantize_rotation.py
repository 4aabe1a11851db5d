"""Rotate the residual stream, so that no channel of what the projections read is much larger than the others.

    h                                  ->   h Q                          Q [D, D] orthogonal, randomized Hadamard
    Gather(E, input_ids)               ->   Gather(E Q, input_ids)
    norm(h; gamma) W                   ->   norm(h Q; 1) (Q^T diag(gamma) W)
    h + x W                            ->   h Q + x (W Q)
    norm(h; gamma) E^T, a tied head    ->   Rotate(Unrotate(norm(h Q; 1)) * gamma) (E Q)^T

An RMS norm commutes with Q, so the model computes the same (QuaRot, Ashkboos et al. 2024, section 4); activations rounded
to int8 lose far less. Only a tied head costs anything: gamma cannot be folded into a table that is also looked up, so the
last norm is turned back and forth, D (a + m) multiply-adds each way, D = 2^a m. The weights are rotated while they are
quantized.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompile.errors import QuantError
from qcompile.functions import DOMAIN, GAMMA_INPUTS
from qcompile.passes.base import Pass, PassContext, PassResult, Rejection
from qcompile.passes.change import detach, finish_rewrites, named_constant, node_label
from qcompile.passes.kernel_rewrite import first_columns, first_rows, matrix_shape
from qcompile.passes.pack import is_projection
from qcompile.passes.proof import Prover, Rewrite
from qcompile.passes.quantize_projections import find_projections
from qcompile.passes.rotated_weights import ReadingWeight, WritingWeight, rotated_rows
from qcompile.passes.unit_norm import is_rotated, mark_rotated
from qcompile.quant.hadamard import Rotation, hadamard_rotation
from qcompile.tensors import StreamedTensor

# Sums of D terms in another order, twice; in half precision the rotated weights are rounded to their type again.
MAX_RELATIVE_ERROR = {ir.DataType.FLOAT: 1e-4, ir.DataType.FLOAT16: 2e-3, ir.DataType.BFLOAT16: 1.6e-2}


@dataclass
class _Stream:
    """What touches the residual stream."""

    embedding: ir.Node
    table: ir.Value
    size: int
    norms: list[ir.Node] = field(default_factory=list)
    writers: list[ir.Node] = field(default_factory=list)


class RotateResidual(Pass):
    """The residual stream."""

    name = "rotate-residual"
    summary = "residual stream rotated by a Hadamard matrix, folded into the weights"

    def call(self, context: PassContext, result: PassResult) -> None:
        """Rotate if everything on the stream can follow; all or nothing."""
        found = _stream(context.model.graph)
        if isinstance(found, str):
            result.rejected.append(Rejection("graph", self.name, found))
            return
        result.matches = 1
        rotation = hadamard_rotation(found.size)
        reason = _disproof(context, result, found, rotation)
        if reason:
            result.rejected.append(Rejection("graph", self.name, f"rolled back: {reason}"))
            return
        _rotate(context.model.graph, found, rotation)
        result.rewrites = 1
        result.detail["rotation"] = {"size": found.size, "seed": 0, "weights": len(found.writers) + len(found.norms)}
        context.forget_analysis()
        finish_rewrites(context)


def _stream(graph: ir.Graph) -> _Stream | str:
    """Follow the residual stream from the embedding; return it, or what stands in the way."""
    embeddings = [p.node for p in find_projections(graph) if p.is_lookup]
    if len(embeddings) != 1 or embeddings[0].inputs[0] is None:
        return "there is no single embedding by input_ids"
    table = embeddings[0].inputs[0]
    if _tied_heads(table, embeddings[0]) is None:
        return f"'{table.name}' is read by more than the embedding and a head"
    found = _Stream(embeddings[0], table, matrix_shape(table)[1])
    stream = [embeddings[0].outputs[0]]
    for value in stream:
        if value.is_graph_output():
            return f"'{value.name}' is an output of the graph"
        for node, _ in value.uses():
            if node in found.norms:
                continue
            reason = _follow(found, stream, node)
            if reason:
                return reason
    if not found.norms:
        return "the residual stream meets no RmsNorm; run the group fuse first"
    if any(is_rotated(norm) for norm in found.norms):
        return "the residual stream was rotated before"
    return found


def _follow(found: _Stream, stream: list[ir.Value], node: ir.Node) -> str:
    """Take one reader of the stream in; return why it cannot be, or nothing."""
    if node.domain != DOMAIN or node.op_type not in GAMMA_INPUTS:
        return f"'{node_label(node)}' ({node.op_type}) reads the residual stream; only RmsNorm can follow a rotation"
    if node.op_type == "AddRmsNorm":
        for value in node.inputs[:2]:
            if value in stream:
                continue
            writer = value.producer() if value is not None else None
            if writer is None or not is_projection(writer) or len(writer.outputs[0].uses()) != 1:
                return f"'{value.name if value else ''}' is added to the residual stream and is no projection"
            found.writers.append(writer)
        stream.append(node.outputs[1])
    gamma = node.inputs[GAMMA_INPUTS[node.op_type]]
    if gamma is None or gamma.const_value is None:
        return f"the gamma of '{node_label(node)}' is no constant"
    found.norms.append(node)
    return ""


def _readers(norm: ir.Node) -> list[ir.Node] | None:
    """Return the projections that read a norm, or None when it must be turned back: a tied head has no own weight."""
    users = [node for node, _ in norm.outputs[0].uses()]
    weights = [node.inputs[1] for node in users if is_projection(node)]
    own = all(weight is not None and len(weight.uses()) == 1 for weight in weights)
    return users if users and own and len(weights) == len(users) else None


def _tied_heads(table: ir.Value, embedding: ir.Node) -> list[ir.Node] | None:
    """Return the MatMuls by the transposed table, or None when something else reads it too."""
    heads: list[ir.Node] = []
    for node, _ in table.uses():
        if node is embedding:
            continue
        readers = [use.node for use in node.outputs[0].uses()] if node.op_type == "Transpose" else [node]
        if any(reader.op_type != "MatMul" or reader.inputs[1] is not node.outputs[0] for reader in readers):
            return None
        heads += readers
    return heads


def _disproof(context: PassContext, result: PassResult, stream: _Stream, rotation: Rotation) -> str:
    """Prove each kind of place on the real weights: a rotated one must compute what the plain one does."""
    if context.prover is None:
        return ""
    prover = Prover(context.prover.seed, MAX_RELATIVE_ERROR[_tensor(stream.table).dtype])
    for norm in stream.norms:
        for reader in _readers(norm) or []:
            reason = _proved(context, result, prover, _reading_rewrite(norm, reader, rotation))
            if reason:
                return f"'{node_label(reader)}': {reason}"
    for head in _tied_heads(stream.table, stream.embedding) or []:
        reason = _proved(context, result, prover, _head_rewrite(head, stream.table, rotation))
        if reason:
            return f"'{node_label(head)}': {reason}"
    for writer in stream.writers:
        reason = _proved(context, result, prover, _writing_rewrite(writer, rotation))
        if reason:
            return f"'{node_label(writer)}': {reason}"
    return ""


def _proved(context: PassContext, result: PassResult, prover: Prover, rewrite: Rewrite) -> str:
    try:
        proof = prover.prove(rewrite, context.analysis)
    finally:
        detach([*rewrite.old_nodes, *rewrite.new_nodes])
    result.proved += 1
    result.max_error = max(result.max_error, proof.error if proof.holds else 0.0)
    return proof.reason


def _reading_rewrite(norm: ir.Node, reader: ir.Node, rotation: Rotation) -> Rewrite:
    """norm(h; gamma) W = norm(h Q; 1) W', on a few columns of W; h may stand for the sum that AddRmsNorm makes."""
    h, gamma, weight = norm.inputs[0], norm.inputs[-1], reader.inputs[1]
    assert weight is not None
    assert gamma is not None
    rotated = _reading_weight(weight, gamma, rotation)
    epsilon = {"epsilon": norm.attributes["epsilon"].as_float()}
    plain = ir.node("RmsNorm", [h, gamma], epsilon, domain=DOMAIN)
    old = ir.node("MatMul", [plain.outputs[0], first_columns(weight)])
    scratch = ir.Graph([], [], nodes=[], name="scratch")
    turned = _rotation_nodes(scratch, h, rotation, gamma.dtype)
    flat = ir.node("RmsNorm", [turned[-1].outputs[0], _ones(gamma)], epsilon, domain=DOMAIN)
    new = ir.node("MatMul", [flat.outputs[0], first_columns(rotated)])
    return Rewrite([plain, old], old.outputs, [*turned, flat, new], new.outputs)


def _writing_rewrite(writer: ir.Node, rotation: Rotation) -> Rewrite:
    """x W + b = Unrotate(x (W Q) + b Q)."""
    inputs = [writer.inputs[0], *_written_inputs(writer, rotation)]
    old = ir.node(writer.op_type, writer.inputs, domain=writer.domain)
    new = ir.node(writer.op_type, inputs, domain=writer.domain)
    scratch = ir.Graph([], [], nodes=[], name="scratch")
    assert writer.inputs[1] is not None
    back = _rotation_nodes(scratch, new.outputs[0], rotation, writer.inputs[1].dtype, back=True)
    return Rewrite([old], old.outputs, [new, *back], back[-1].outputs)


def _head_rewrite(head: ir.Node, table: ir.Value, rotation: Rotation) -> Rewrite:
    """x E^T = Rotate(x) (E Q)^T, on a few rows of E."""
    rotated = _constant(f"{table.name}.rotated", rotated_rows(_tensor(table), rotation, ""))
    few = [ir.node("Transpose", [first_rows(value)], {"perm": [1, 0]}) for value in (table, rotated)]
    old = ir.node("MatMul", [head.inputs[0], few[0].outputs[0]])
    scratch = ir.Graph([], [], nodes=[], name="scratch")
    turned = _rotation_nodes(scratch, head.inputs[0], rotation, table.dtype)
    new = ir.node("MatMul", [turned[-1].outputs[0], few[1].outputs[0]])
    return Rewrite([few[0], old], old.outputs, [few[1], *turned, new], new.outputs)


def _rotate(graph: ir.Graph, stream: _Stream, rotation: Rotation) -> None:
    for norm in stream.norms:
        gamma = norm.inputs[-1]
        assert gamma is not None
        readers = _readers(norm)
        norm.replace_input_with(len(norm.inputs) - 1, _registered(graph, _ones(gamma)))
        mark_rotated(norm)
        if readers is None:
            _turn_back(graph, norm, gamma, rotation)
        for reader in readers or []:
            weight = reader.inputs[1]
            assert weight is not None
            reader.replace_input_with(1, _registered(graph, _reading_weight(weight, gamma, rotation)))
    for writer in stream.writers:
        for index, value in enumerate(_written_inputs(writer, rotation), start=1):
            writer.replace_input_with(index, _registered(graph, value))
    name = f"{stream.table.name}.rotated"
    table = _registered(graph, _constant(name, rotated_rows(_tensor(stream.table), rotation, name)))
    for head in _tied_heads(stream.table, stream.embedding) or []:
        nodes = _rotation_nodes(graph, head.inputs[0], rotation, table.dtype)
        graph.insert_before(head, nodes)
        head.replace_input_with(0, nodes[-1].outputs[0])
    for node, index in list(stream.table.uses()):
        node.replace_input_with(index, table)


def _turn_back(graph: ir.Graph, norm: ir.Node, gamma: ir.Value, rotation: Rotation) -> None:
    """Give the readers of a norm what they read before: Unrotate(y) * gamma."""
    y = norm.outputs[0]
    users = list(y.uses())
    nodes = _rotation_nodes(graph, y, rotation, gamma.dtype, back=True)
    nodes.append(ir.node("Mul", [nodes[-1].outputs[0], gamma], name=f"{norm.name}.gamma"))
    nodes[-1].outputs[0].type, nodes[-1].outputs[0].shape = y.type, y.shape
    for node, index in users:
        node.replace_input_with(index, nodes[-1].outputs[0])
    graph.insert_after(norm, nodes)


def _rotation_nodes(
    graph: ir.Graph, x: ir.Value | None, rotation: Rotation, dtype: ir.DataType | None, *, back: bool = False
) -> list[ir.Node]:
    """Return the nodes of x Q, or of x Q^T: signs, and the product with S (x) B as two small ones."""
    numpy_type = (dtype or ir.DataType.FLOAT).numpy()
    rows, width = 1 << rotation.power, len(rotation.block)
    kind = f"{rotation.size}.{'back' if back else 'forth'}"
    block = rotation.block.T if back else rotation.block
    # Of rank 3: a matrix would be taken for a projection, and quantized.
    inner = named_constant(graph, f"rotation.block.{kind}", np.ascontiguousarray(block[None]).astype(numpy_type))
    outer = named_constant(graph, f"rotation.hadamard.{rotation.size}", _sylvester(rotation.power).astype(numpy_type))
    signs = named_constant(graph, f"rotation.signs.{rotation.size}", rotation.signs.astype(numpy_type))
    matrix_shape = named_constant(graph, f"rotation.shape.{rows}x{width}", np.array([0, 0, rows, width], np.int64))
    flat_shape = named_constant(graph, f"rotation.shape.{rotation.size}", np.array([0, 0, rotation.size], np.int64))
    signed = ir.node("Mul", [x, signs])
    nodes = [] if back else [signed]
    nodes.append(ir.node("Reshape", [x if back else signed.outputs[0], matrix_shape]))
    nodes.append(ir.node("MatMul", [nodes[-1].outputs[0], inner]))
    nodes.append(ir.node("MatMul", [outer, nodes[-1].outputs[0]]))
    nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], flat_shape]))
    if back:
        signed.replace_input_with(0, nodes[-1].outputs[0])
        nodes.append(signed)
    for index, node in enumerate(nodes):
        node.name = f"rotation.{'back' if back else 'forth'}.{node.op_type}_{index}"
    nodes[-1].outputs[0].type = ir.TensorType(dtype or ir.DataType.FLOAT)
    return nodes


def _sylvester(power: int) -> np.ndarray:
    """Return Sylvester's matrix of order 2^a divided by its root: symmetric and orthogonal."""
    matrix = np.ones((1, 1))
    for _ in range(power):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / math.sqrt(1 << power)


def _ones(gamma: ir.Value) -> ir.Value:
    tensor = gamma.const_value
    assert tensor is not None
    return _constant("rotation.ones", ir.tensor(np.ones(tensor.shape.numpy(), tensor.dtype.numpy())))


def _reading_weight(weight: ir.Value, gamma: ir.Value, rotation: Rotation) -> ir.Value:
    assert weight.const_value is not None
    assert gamma.const_value is not None
    name = f"{weight.name}.rotated"
    return _constant(name, ReadingWeight(weight.const_value, gamma.const_value.numpy(), rotation, name))


def _written_inputs(writer: ir.Node, rotation: Rotation) -> list[ir.Value]:
    weight = writer.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    name = f"{weight.name}.rotated"
    found = [_constant(name, WritingWeight(weight.const_value, rotation, name))]
    if writer.op_type == "Linear":
        bias = writer.inputs[2]
        if bias is None or bias.const_value is None:
            raise QuantError(f"the bias of '{node_label(writer)}' is no constant; drop rotate-residual")
        rotated = rotation.apply(bias.const_value.numpy()).astype(bias.const_value.dtype.numpy())
        found.append(_constant(f"{bias.name}.rotated", ir.tensor(rotated)))
    return found


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value


def _constant(name: str, tensor: ir.TensorProtocol | StreamedTensor) -> ir.Value:
    shape = ir.Shape(tensor.shape.numpy())
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)


def _registered(graph: ir.Graph, value: ir.Value) -> ir.Value:
    assert value.name is not None
    if value.name not in graph.initializers:
        graph.register_initializer(value)
    return graph.initializers[value.name]
