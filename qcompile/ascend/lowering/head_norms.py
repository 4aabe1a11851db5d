"""Norms of the heads of q and k (Qwen3) and their rotation in two kernels instead of four, for a decode step.

    rotary(norm(x) * gamma; cos, sin) = rotary(norm(x); cos * gamma, sin * swap(gamma))       swap exchanges the halves

With gamma in the angles, q and k side by side [B, 1, H + K, d] are normed by ones and rotated together. The angles of all
layers, [L, B, 1, H + K, d], come from one multiplication per step. For a chunk of a prompt they would be as large as the
cache, and the norms stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.ascend.lowering.attention import Heads, StepInputs
from qcompile.ascend.lowering.static_graph import StaticGraph, dims
from qcompile.functions import DOMAIN


@dataclass(frozen=True)
class HeadNorms:
    """The norms in front of an attention.

    Attributes:
        q: Norm of the query heads.
        k: Norm of the key heads.
        packed: The projection's result q | k | v that both come from.
    """

    q: ir.Node
    k: ir.Node
    packed: ir.Value

    @property
    def epsilon(self) -> float:
        """Their epsilon."""
        return self.q.attributes["epsilon"].as_float()


def head_norms_of(attention: ir.Node) -> HeadNorms | None:
    """Return the norms of an attention whose q, k and v are split from one projection; None when it is another form."""
    norms = [_through_reshapes(value) for value in attention.inputs[:2]]
    parts = [_through_reshapes(norm.inputs[0]) if norm is not None else None for norm in norms]
    parts.append(_through_reshapes(attention.inputs[2]))
    q, k = norms
    if q is None or k is None or any((n.domain, n.op_type) != (DOMAIN, "RmsNorm") for n in (q, k)):
        return None
    split = parts[0]
    if split is None or split.op_type != "Split" or any(part is not split for part in parts):
        return None
    sources = [_source(q.inputs[0]), _source(k.inputs[0]), _source(attention.inputs[2])]
    if sources != list(split.outputs) or any(len(list(value.uses())) != 1 for value in split.outputs):
        return None
    if q.attributes["epsilon"].as_float() != k.attributes["epsilon"].as_float() or split.inputs[0] is None:
        return None
    return HeadNorms(q, k, split.inputs[0])


def _source(value: ir.Value | None) -> ir.Value | None:
    """Return the value in front of reshapes."""
    while value is not None:
        node = value.producer()
        if node is None or node.op_type != "Reshape":
            return value
        value = node.inputs[0]
    return None


def _through_reshapes(value: ir.Value | None) -> ir.Node | None:
    source = _source(value)
    return source.producer() if source is not None else None


def angles_by_layer(
    graph: StaticGraph, step: StepInputs, gammas: Sequence[tuple[np.ndarray, np.ndarray]], heads: Heads
) -> list[tuple[ir.Value, ir.Value]]:
    """Append the angles of every layer with its gammas in them.

    Args:
        graph: The graph to append to.
        step: cos and sin [B, 1, 1, d].
        gammas: Of q and of k [d], by layer, in the graph's type.
        heads: How many.

    Returns:
        cos and sin [B, 1, H + K, d] of each layer.
    """
    b, _, _, d = dims(step.cos)
    n, layers = heads.num + heads.kv, len(gammas)
    rows = np.stack([np.concatenate([np.tile(q, (heads.num, 1)), np.tile(k, (heads.kv, 1))]) for q, k in gammas])
    swapped = np.concatenate([rows[..., d // 2 :], rows[..., : d // 2]], axis=-1)
    made = []
    for name, table, factors in (("cos", step.cos, rows), ("sin", step.sin, swapped)):
        gamma = graph.constant(f"rope.gamma.{name}", np.ascontiguousarray(factors.reshape(layers, 1, 1, n, d)))
        angles = graph.reshape(table, (1, b, 1, 1, d), f"step.{name}.layers")
        scaled = graph.op("Mul", [angles, gamma], (layers, b, 1, n, d), name=f"step.{name}.with_gamma")
        parts = graph.split(scaled, [1] * layers, 0, f"step.{name}.by_layer") if layers > 1 else [scaled]
        made.append([graph.reshape(part, (b, 1, n, d), f"step.{name}.{i}") for i, part in enumerate(parts)])
    return list(zip(*made, strict=True))
