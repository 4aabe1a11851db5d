"""Keep the logits of the last position only: the final projection then runs on one row per sequence.

    qcompile optimize model.onnx --surgery examples/last_token_logits.py:last_token_logits -o smaller

Before: logits [B, S, V]; after: logits [B, 1, V], of position S - 1. That is the newest token when rows are
padded on the left, as transformers does. No weight is read.
"""

import numpy as np
import onnx_graphsurgeon as gs


def last_token_logits(graph: gs.Graph) -> gs.Graph:
    """Put a Gather of the last position in front of the MatMul (or Linear) that makes the logits."""
    (logits,) = [tensor for tensor in graph.outputs if tensor.name == "logits"]
    projection = logits.inputs[0]
    hidden = projection.inputs[0]
    last = gs.Variable("last_hidden_state", dtype=hidden.dtype)
    position = gs.Constant("last_position", np.array([-1], dtype=np.int64))
    graph.nodes.append(gs.Node("Gather", "last_position_only", {"axis": 1}, inputs=[hidden, position], outputs=[last]))
    projection.inputs[0] = last
    logits.shape = [logits.shape[0], 1, *logits.shape[2:]]
    return graph.toposort()
