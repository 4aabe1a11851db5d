"""A graph made ready for scoring: logits of every position, and the residual stream as further outputs.

The copy exists in memory only. Weights stay where they are: the bytes returned refer to the same data files, and ONNX
Runtime is told their directory.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from qcompile.artifact import load_model
from qcompile.errors import GraphError
from qcompile.quality.residual_stream import residual_stream

_INDEX_INPUT = "last_token_index"


@dataclass(frozen=True)
class ScoringGraph:
    """What ONNX Runtime is given.

    Attributes:
        model_bytes: The graph; external data named relative to `folder`.
        folder: Where the data files are.
        scores_all: Logits of every position come out; else those of one position per call.
        stream: Output names after each half block (attention 0, feed-forward 0, attention 1, …); empty if not
            asked for or not found.
        stream_reason: Why `stream` is empty though it was asked for.
    """

    model_bytes: bytes
    folder: Path
    scores_all: bool
    stream: tuple[str, ...]
    stream_reason: str = ""


def scoring_graph(path: Path, num_layers: int, *, with_stream: bool) -> ScoringGraph:
    """Read an .onnx file and change it for scoring.

    Args:
        path: The graph; it is not written to.
        num_layers: Decoder layers.
        with_stream: Expose the residual stream.

    Raises:
        GraphError: The file cannot be read.
    """
    model = load_model(path)
    scores_all = remove_last_token_selection(model.graph)
    stream: list[ir.Value] = []
    reason = ""
    if with_stream:
        try:
            stream = residual_stream(model.graph, num_layers)
        except GraphError as error:
            reason = str(error)
        present = set(model.graph.outputs)
        model.graph.outputs.extend(value for value in stream if value not in present)
    folder = Path(os.path.abspath(path.parent))
    _relocate(model.graph, folder)
    model_bytes = ir.to_proto(model).SerializeToString()
    return ScoringGraph(model_bytes, folder, scores_all, tuple(v.name or "" for v in stream), reason)


def remove_last_token_selection(graph: ir.Graph) -> bool:
    """Undo `select-last-token`: the projection gets all S rows again, and the input goes away.

    Returns:
        Whether the graph now gives the logits of every position (also when it always did).
    """
    index = next((v for v in graph.inputs if v.name == _INDEX_INPUT), None)
    if index is None:
        return True
    selections = _selections(index)
    if not selections:
        return False
    for hidden, selected in selections:
        selected.replace_all_uses_with(hidden)
        _forget_shapes(hidden)
    _remove_dead(graph)
    if index.uses():
        return False
    graph.inputs.remove(index)
    return True


def _selections(index: ir.Value) -> list[tuple[ir.Value, ir.Value]]:
    """Return (hidden [B, S, D], selected [B, 1, D]) wherever the index picks rows."""
    found = []
    for rows in [usage.node.outputs[0] for usage in index.uses() if usage.node.op_type == "Unsqueeze"]:
        for usage in rows.uses():
            gather = usage.node
            is_selection = gather.op_type == "GatherND" and usage.idx == 1 and _batch_dims(gather) == 1
            restored = [u.node for u in gather.outputs[0].uses()]
            if is_selection and gather.inputs[0] is not None and all(n.op_type == "Unsqueeze" for n in restored):
                found += [(gather.inputs[0], node.outputs[0]) for node in restored]
    return found


def _batch_dims(node: ir.Node) -> int:
    attribute = node.attributes.get("batch_dims")
    return attribute.as_int() if attribute is not None else 0


def _forget_shapes(start: ir.Value) -> None:
    """Forget the declared shapes of everything computed from a value: they said one row."""
    waiting, seen = [start], set()
    while waiting:
        for usage in waiting.pop().uses():
            for value in usage.node.outputs:
                if value not in seen:
                    seen.add(value)
                    value.shape = None
                    waiting.append(value)


def _remove_dead(graph: ir.Graph) -> None:
    outputs = set(graph.outputs)
    for node in reversed(list(graph)):
        if not any(v.uses() or v in outputs for v in node.outputs):
            graph.remove(node, safe=True)


def _relocate(graph: ir.Graph, folder: Path) -> None:
    """Name external data relative to the model's directory, also where it lies deeper."""
    for value in graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and Path(os.path.abspath(tensor.base_dir)) != folder:
            location = os.path.relpath(tensor.path, folder)
            value.const_value = ir.ExternalTensor(
                location, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=value.name or ""
            )
