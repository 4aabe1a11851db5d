"""Projections: MatMul and Add for float weights; GE makes one kernel of the two."""

from __future__ import annotations

import onnx_ir as ir

from qcompile.ascend.lowering.folding import Foldings
from qcompile.ascend.lowering.static_graph import StaticGraph, dims
from qcompile.ascend.lowering.typed_weights import TypedWeights
from qcompile.errors import UnsupportedOpError

Values = dict[ir.Value, ir.Value]


def lower_linear(graph: StaticGraph, weights: TypedWeights, foldings: Foldings, node: ir.Node, values: Values) -> bool:
    """Append a projection of x [B, S, M]; return False when the node is none."""
    if node.op_type == "Transpose":
        return True  # of a weight; its reader looks through it
    if node.op_type not in {"MatMul", "Linear"}:
        return False
    x = _last_token(graph, values[_present(node.inputs[0])]) if node is foldings.vocabulary else None
    x = x if x is not None else values[_present(node.inputs[0])]
    weight = _present(node.inputs[1])
    name = node.name or "projection"
    if weight.const_value is None:
        y = _by_rows(graph, weights, x, weight, name)
    else:
        tensor = weights.typed(weight.name or name, weight.const_value, foldings.of(node))
        shape = (*dims(x)[:-1], int(tensor.shape[1]))  # type: ignore[arg-type]
        y = graph.op("MatMul", [x, graph.weight(weight.name or name, tensor)], shape, name=name)
    if node.op_type == "Linear":
        bias = _present(node.inputs[2])
        assert bias.const_value is not None
        typed = weights.typed(bias.name or f"{name}.bias", bias.const_value, foldings.of(node))
        y = graph.op("Add", [y, graph.weight(bias.name or f"{name}.bias", typed)], dims(y), name=f"{name}.biased")
    values[node.outputs[0]] = y
    return True


def _by_rows(graph: StaticGraph, weights: TypedWeights, x: ir.Value, weight: ir.Value, name: str) -> ir.Value:
    """Multiply by the transpose of a stored matrix [N, M], such as a tied embedding, without a second copy of it."""
    transpose = weight.producer()
    table = transpose.inputs[0] if transpose is not None and transpose.op_type == "Transpose" else None
    if table is None or table.const_value is None:
        raise UnsupportedOpError(f"node '{name}' (MatMul) multiplies two activations; no lowering is known for it")
    stored = graph.weight(table.name or name, weights.typed(table.name or name, table.const_value))
    b, s, m = dims(x)
    rows = graph.reshape(x, (b * s, m), f"{name}.rows")
    n = dims(stored)[0]
    product = graph.op("Gemm", [rows, stored], (b * s, n), name=name, transB=1)
    return graph.reshape(product, (b, s, n), f"{name}.by_slot")


def _last_token(graph: StaticGraph, hidden: ir.Value) -> ir.Value:
    """Choose the row whose logits are wanted: `last_token_index` of a prefill chunk [1, S, D]."""
    index = next((value for value in graph.inputs if value.name == "last_token_index"), None)
    if index is None:
        return hidden
    b, _, d = dims(hidden)
    return graph.op("Gather", [hidden, index], (b, 1, d), name="last_token", axis=1)


def _present(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value
