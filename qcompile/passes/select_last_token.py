"""Compute logits for one position per row only: select the row before the vocabulary projection, not after.

    logits [B, S, V] = hidden [B, S, D] @ W     ->     logits [B, 1, V] = hidden[b, last_token_index[b]] @ W

`last_token_index` int64 [B] is a new input. At 152k tokens the projection of a 512-token chunk is a third of its work.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.functions import DOMAIN
from qcompile.passes.base import Pass, PassContext, PassResult, Rejection
from qcompile.passes.change import finish_rewrites, named_constant
from qcompile.quantized_functions import QUANTIZED_LINEARS

# Row by row operators between the vocabulary projection and the logits: selecting rows commutes with them.
_PROJECTIONS = {"MatMul", "Linear", *QUANTIZED_LINEARS}
_ROW_WISE = {*_PROJECTIONS, "Add", "Mul", "Cast", "Identity"}


class SelectLastToken(Pass):
    """Logits of the last position."""

    name = "select-last-token"
    summary = "logits for one position per row"

    def call(self, context: PassContext, result: PassResult) -> None:
        """Insert the selection in front of the vocabulary projection."""
        graph = context.model.graph
        logits = next((v for v in graph.outputs if v.name == "logits"), None)
        if logits is None or any(v.name == "last_token_index" for v in graph.inputs):
            return
        result.matches = 1
        projection = _projection(logits)
        if projection is None or projection.inputs[0] is None:
            reason = "logits do not come from a projection of the hidden states"
            result.rejected.append(Rejection("logits", self.name, reason))
            return
        hidden = projection.inputs[0]
        batch = next((v.shape[0] for v in graph.inputs if v.name == "input_ids" and v.shape is not None), None)
        index = ir.Value(name="last_token_index", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([batch]))
        position = 1 + next((i for i, v in enumerate(graph.inputs) if v.name == "input_ids"), -1)
        graph.inputs.insert(position, index)
        one = named_constant(graph, "axes.1", np.array([1], dtype=np.int64))
        rows = ir.node("Unsqueeze", [index, one], name="last_token.rows")
        selected = ir.node("GatherND", [hidden, rows.outputs[0]], {"batch_dims": 1}, name="last_token.select")
        restored = ir.node("Unsqueeze", [selected.outputs[0], one], name="last_token.hidden")
        restored.outputs[0].type = hidden.type
        graph.insert_before(projection, [rows, selected, restored])
        projection.replace_input_with(0, restored.outputs[0])
        for node, position in _beside(projection, hidden, logits):
            node.replace_input_with(position, restored.outputs[0])
        if logits.shape is not None:
            logits.shape = ir.Shape([logits.shape[0], 1, logits.shape[2]])
        result.rewrites = 1
        finish_rewrites(context)
        context.forget_analysis()


def _beside(projection: ir.Node, hidden: ir.Value, logits: ir.Value) -> list[tuple[ir.Node, int]]:
    """Return what else reads the hidden states on the way to the logits alone: the sums for the offsets of lossless codes."""
    ahead = {logits.producer()}
    stack = [logits.producer()]
    while stack:
        node = stack.pop()
        for value in node.inputs if node is not None and node is not projection else ():
            before = value.producer() if value is not None and value is not hidden else None
            if before is not None and before not in ahead:
                ahead.add(before)
                stack.append(before)
    return [(node, position) for node, position in hidden.uses() if node in ahead and node is not projection]


def _projection(logits: ir.Value) -> ir.Node | None:
    """Return the first projection met on the way from the logits towards the hidden states."""
    node = logits.producer()
    while node is not None and node.op_type in _ROW_WISE and node.domain in {"", DOMAIN}:
        if node.op_type in _PROJECTIONS:
            return node
        value = node.inputs[0]
        node = value.producer() if value is not None else None
    return None
