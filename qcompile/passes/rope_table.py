"""Turn the subgraph that computes cos and sin from position_ids into a table by position, when it is one.

A table is possible when the angle at a position depends on that position alone. Dynamic NTK scaling fails that test (its
frequencies follow the longest position of the step) and stays computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.ort import run_session
from qcompile.passes.proof import sort_nodes

_SAMPLES = 16


@dataclass(frozen=True)
class RopeTable:
    """cos and sin by position: float32 [max_position, d / 2]."""

    cos: np.ndarray
    sin: np.ndarray


def tabulate(cos: ir.Value, sin: ir.Value, max_position: int) -> RopeTable | str:
    """Evaluate the subgraph behind `cos` and `sin` [B, 1, S, d] for positions 0 to max_position - 1.

    Returns:
        The table, or the reason why there is none.
    """
    nodes, inputs = _subgraph([cos, sin])
    names = {value.name for value in inputs}
    if names != {"position_ids"}:
        return f"cos and sin hang on {', '.join(sorted(str(n) for n in names)) or 'nothing'}, wanted position_ids alone"
    proto = _model(nodes, inputs, [cos, sin])
    everything = _angles(proto, np.arange(max_position)[None])
    for position in np.unique(np.linspace(0, max_position - 1, _SAMPLES).astype(np.int64)):
        alone = _angles(proto, np.array([[position]]))
        if any(not np.allclose(t[position], a[0], rtol=0, atol=1e-5) for t, a in zip(everything, alone, strict=True)):
            return f"the angle at position {position} depends on the other positions of the step (dynamic NTK scaling)"
    half = everything[0].shape[-1] // 2
    if any(not np.array_equal(t[:, :half], t[:, half:]) for t in everything):
        return "cos and sin are not two equal halves"
    return RopeTable(*(np.ascontiguousarray(t[:, :half]) for t in everything))


def _angles(proto: bytes, positions: np.ndarray) -> list[np.ndarray]:
    """Return cos and sin as float32 [S, d]."""
    outputs = run_session({}, proto, {"position_ids": positions.astype(np.int64)})
    return [x.astype(np.float32).reshape(positions.shape[1], -1) for x in outputs]


def _subgraph(values: list[ir.Value]) -> tuple[list[ir.Node], list[ir.Value]]:
    """Return the nodes that compute the values and the graph inputs they start from."""
    nodes: dict[ir.Node, None] = {}
    inputs: dict[ir.Value, None] = {}
    todo = list(values)
    while todo:
        value = todo.pop()
        node = value.producer()
        if node is None:
            if value.const_value is None:
                inputs[value] = None
        elif node not in nodes:
            nodes[node] = None
            todo.extend(v for v in node.inputs if v is not None)
    return sort_nodes(list(nodes)), list(inputs)


def _model(nodes: list[ir.Node], inputs: list[ir.Value], outputs: list[ir.Value]) -> bytes:
    opsets = {d: v for d, v in (nodes[0].graph.opset_imports if nodes[0].graph else {"": 18}).items() if d == ""}
    values: dict[ir.Value | None, ir.Value | None] = {None: None}
    for value in inputs:
        values[value] = ir.Value(name=value.name, type=value.type, shape=ir.Shape([None] * len(value.shape or ())))
    initializers: dict[ir.Value, ir.Value] = {}
    for node in nodes:
        for operand in node.inputs:
            if operand is not None and operand.const_value is not None and operand not in values:
                copy = ir.Value(name=f"c{len(initializers)}", const_value=operand.const_value)
                values[operand] = copy
                initializers[operand] = copy
    copies = []
    for index, node in enumerate(nodes):
        made = [ir.Value(name=f"n{index}_{i}") for i in range(len(node.outputs))]
        inner = [values[v] for v in node.inputs]
        copies.append(ir.Node(node.domain, node.op_type, inner, list(node.attributes.values()), outputs=made))
        values.update(zip(node.outputs, made, strict=True))
    graph = ir.Graph(
        [v for v in (values[i] for i in inputs) if v is not None],
        [v for v in (values[o] for o in outputs) if v is not None],
        nodes=copies,
        initializers=[v for v in initializers.values() if v is not None],
        opset_imports=opsets,
        name="rope",
    )
    return bytes(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString())
