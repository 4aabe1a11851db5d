"""Put a target's kernel in the place of a quantized operator, proved on some of its outputs.

Output channels are independent, so the proof takes the first few hundred: a vocabulary of 152k is not multiplied twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.functions import MIN_OPSET
from qcompile.passes.base import PassContext, PassResult, Rejection
from qcompile.passes.change import detach, node_label
from qcompile.passes.proof import MAX_RELATIVE_ERROR, Prover, Rewrite
from qcompile.weights import columns_of, rows_of

MICROSOFT = "com.microsoft"
PROVED_OUTPUTS = 256
_IR_10_OPSET = 21  # came with ONNX 1.16, as IR version 10 did


@dataclass(frozen=True)
class Kernel:
    """What comes in the place of an operator.

    Attributes:
        nodes: The new nodes, producers first; the last one gives the output.
        initializers: Constants made for them.
        opset: The standard opset that they need; the graph's is raised to it.
    """

    nodes: Sequence[ir.Node]
    initializers: Sequence[ir.Value] = ()
    opset: int = MIN_OPSET


MakeKernel = Callable[..., Kernel]


def lower(
    context: PassContext,
    result: PassResult,
    node: ir.Node,
    make: MakeKernel,
    few: Callable[[ir.Value], ir.Value],
    limit: float = MAX_RELATIVE_ERROR,
    add: ir.Node | None = None,
) -> bool:
    """Prove what `make` gives for a node on few of its outputs, then replace the node.

    Args:
        context: Model and prover.
        result: Where the place is counted.
        node: The quantized operator; its first input is the activation, the others are constants.
        make: Returns the kernel for a node; constants that may be shared are registered in the graph it is given. With
            `add` it gets the bias as well.
        few: Returns a constant cut down to few outputs.
        limit: Largest relative error that passes.
        add: The only reader of the node, which adds a constant that the kernel takes in.
    """
    result.matches += 1
    bias = [] if add is None else [value for value in add.inputs if value is not None and value.const_value is not None]
    opset = context.model.graph.opset_imports.get("", MIN_OPSET)
    if context.prover is not None:
        constants = [few(value) for value in node.inputs[1:] if value is not None]
        prover = Prover(context.prover.seed, limit, embeds_weights=True, step=_largest_scale(constants))
        # without the bias too: a large one would hide what is wrong with the product
        sides = [[], [few(value) for value in bias]] if bias else [[]]
        rewrites = [_few_outputs(node, constants, side, make, opset) for side in sides]
        if not is_proved(rewrites, prover, context, result, node):
            return False
    kernel = make(node, context.model.graph, *bias)
    _raise_opset(context.model, max(opset, kernel.opset))
    for index, new_node in enumerate(kernel.nodes):
        is_kernel = len(kernel.nodes) == 1 or new_node.domain == MICROSOFT
        new_node.name = node.name if is_kernel else f"{node.name}.{new_node.op_type}_{index}"
    replace(context, node, kernel.nodes, add)
    result.rewrites += 1
    return True


def _few_outputs(
    node: ir.Node, constants: Sequence[ir.Value], bias: Sequence[ir.Value], make: MakeKernel, opset: int
) -> Rewrite:
    """Return the two sides of a lowering for constants of few outputs."""
    old = ir.node(node.op_type, [node.inputs[0], *constants], node.attributes, domain=node.domain)
    before = [old, *(ir.node("Add", [old.outputs[0], value]) for value in bias)]
    new = make(old, ir.Graph([], [], nodes=[], name="scratch"), *bias)
    opsets = (opset, max(opset, new.opset))
    return Rewrite(before, before[-1].outputs, new.nodes, new.nodes[-1].outputs, opsets)


def _raise_opset(model: ir.Model, opset: int) -> None:
    model.graph.opset_imports[""] = opset
    if opset >= _IR_10_OPSET:
        model.ir_version = max(model.ir_version, 10)


def _largest_scale(constants: Sequence[ir.Value]) -> float:
    """Return the largest float among the constants of an operator: what an activation of 1 times a code of 1 comes to."""
    arrays = [value.const_value.numpy() for value in constants if value.const_value is not None]
    return max((float(np.abs(array).max()) for array in arrays if array.dtype.kind not in "iu"), default=0.0)


def is_proved(
    rewrites: Sequence[Rewrite], prover: Prover, context: PassContext, result: PassResult, node: ir.Node
) -> bool:
    """Prove a place by rewrites of nodes made for the purpose; disconnect them, count, and report a refusal."""
    try:
        proofs = [prover.prove(rewrite, context.analysis) for rewrite in rewrites]
    finally:
        detach([new_or_old for rewrite in rewrites for new_or_old in (*rewrite.old_nodes, *rewrite.new_nodes)])
    for proof in proofs:
        if not proof.holds:
            result.rejected.append(Rejection(node_label(node), result.name, f"rolled back: {proof.reason}"))
            return False
    result.proved += 1
    result.max_error = max(result.max_error, *(proof.error for proof in proofs))
    return True


def replace(context: PassContext, node: ir.Node, new_nodes: Sequence[ir.Node], add: ir.Node | None = None) -> None:
    """Put nodes in the place of one, and of the Add behind it if given; the last one's output stands for its output."""
    last = add or node
    graph, old, output = context.model.graph, last.outputs[0], new_nodes[-1].outputs[0]
    output.type, output.shape = old.type, old.shape
    context.analysis.alias(output, old)
    gone = [node] if add is None else [node, add]
    ir.convenience.replace_nodes_and_values(graph, node, gone, list(new_nodes), last.outputs, [output])
    graph.opset_imports.setdefault(MICROSOFT, 1)


def first_rows(value: ir.Value) -> ir.Value:
    """Return a constant with the first rows of a weight, or the constant itself when it is a scalar."""
    assert value.const_value is not None
    dims = value.const_value.shape.numpy()
    if not dims:
        return value
    return _constant(value, rows_of(value.const_value, 0, min(PROVED_OUTPUTS, int(dims[0]))))


def first_columns(value: ir.Value) -> ir.Value:
    """Return a constant with the first columns of a matrix, the first elements of a vector, or a scalar itself."""
    assert value.const_value is not None
    dims = value.const_value.shape.numpy()
    if len(dims) != 2:
        return first_rows(value)
    return _constant(value, columns_of(value.const_value, 0, min(PROVED_OUTPUTS, int(dims[1]))).T)


def matrix_shape(value: ir.Value) -> tuple[int, int]:
    """Return the dimensions of a constant matrix."""
    assert value.const_value is not None
    rows, columns = (int(d) for d in value.const_value.shape.numpy())
    return rows, columns


def _constant(value: ir.Value, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(np.ascontiguousarray(array))
    kind = ir.TensorType(tensor.dtype)
    return ir.Value(name=f"{value.name}.first", type=kind, shape=ir.Shape(array.shape), const_value=tensor)
