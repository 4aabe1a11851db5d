"""Turn the subgraph that computes cos and sin from position_ids into a table by position, when it is one.

A table is possible when the angle at a position depends on that position alone. Dynamic NTK scaling fails that test (its
frequencies follow the longest position of the step) and stays computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.errors import GraphError
from qcompile.ort import run_session
from qcompile.passes.excerpt import model_of, outer_values, sort_nodes

_SAMPLES = 16
# Sixteen times the context of any Qwen; a manifest may say anything.
_MAX_ROWS = 1 << 21


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
    if max_position > _MAX_ROWS:
        return f"{max_position} positions are too many for a table, the most are {_MAX_ROWS}"
    angles = _Angles(cos, sin)
    names = [str(v.name) for v in angles.inputs]
    if names != ["position_ids"]:
        return f"cos and sin hang on {', '.join(sorted(names)) or 'nothing'}, wanted position_ids alone"
    try:
        tables = angles.at(np.arange(max_position))
        for position in np.unique(np.linspace(0, max_position - 1, _SAMPLES).astype(np.int64)):
            alone = angles.at(position[None])
            if any(not np.allclose(t[position], a[0], rtol=0, atol=1e-5) for t, a in zip(tables, alone, strict=True)):
                return f"the angle at position {position} hangs on other positions of the step (dynamic NTK scaling)"
    except GraphError as error:
        return f"cos and sin cannot be computed alone: {error}"
    half = tables[0].shape[-1] // 2
    if any(not np.array_equal(t[:, :half], t[:, half:]) for t in tables):
        return "cos and sin are not two equal halves"
    return RopeTable(*(np.ascontiguousarray(t[:, :half]) for t in tables))


class _Angles:
    """cos and sin as a model of their own."""

    def __init__(self, cos: ir.Value, sin: ir.Value) -> None:
        self.outputs = [cos, sin]
        self.nodes = _producers(self.outputs)
        outside = outer_values(self.nodes, self.outputs)
        self.inputs = [v for v in outside if v.const_value is None]
        self._constants = [v for v in outside if v.const_value is not None]
        self._sessions: dict[bytes, object] = {}

    def at(self, positions: np.ndarray) -> list[np.ndarray]:
        """Return cos and sin at positions [S]: float32 [S, d]."""
        (ids,) = self.inputs
        dtype = np.dtype(np.int64) if ids.dtype is None else ids.dtype.numpy()
        stand_ins = {ids: ir.Value(name=ids.name, type=ids.type, shape=ir.Shape([None, None]))}
        # bfloat16 is nothing that a NumPy program can be given
        widens = any(v.dtype == ir.DataType.BFLOAT16 for v in self.outputs)
        for index, value in enumerate(self._constants):
            tensor = value.const_value
            if widens and tensor is not None and tensor.dtype == ir.DataType.BFLOAT16:
                tensor = ir.tensor(tensor.numpy().astype(np.float32))
            stand_ins[value] = ir.Value(name=f"c{index}", const_value=tensor)
        graph = self.nodes[0].graph
        imports = {} if graph is None else graph.opset_imports
        model_bytes = model_of(self.nodes, self.outputs, stand_ins, imports, widens=widens)
        arrays = run_session(self._sessions, model_bytes, {str(ids.name): positions[None].astype(dtype)})
        return [x.astype(np.float32).reshape(len(positions), -1) for x in arrays]


def _producers(values: list[ir.Value]) -> list[ir.Node]:
    """Return the nodes that compute the values, in order."""
    nodes: dict[ir.Node, None] = {}
    todo = list(values)
    while todo:
        node = todo.pop().producer()
        if node is not None and node not in nodes:
            nodes[node] = None
            todo.extend(v for v in node.inputs if v is not None)
    return sort_nodes(nodes)
