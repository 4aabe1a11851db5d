"""Which attentions take a key from all keys before the scores: those whose biases alone make scores too coarse for float16.

A score is (q + b_q) . (k + b_k) * scale, up to the rotation, which keeps norms. Its part from the biases is at most
|b_q| |b_k| * scale, the same for all keys up to the rotation. Float16 numbers near 64 are 0.06 apart: the weights of a
softmax over such scores are wrong by as many percent. Qwen2.5-0.5B has 4566 in its first layer, and 1358 in the ninth.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.ascend.lowering.folding import Foldings
from qcompile.functions import DOMAIN

COARSE_SCORE = 64.0


def bias_scores(model: ir.Model, foldings: Foldings) -> dict[int, float]:
    """Return, for each attention layer whose q and k have biases, the largest score that these can make."""
    found = {}
    for node in model.graph:
        if (node.domain, node.op_type) != (DOMAIN, "Attention"):
            continue
        biases = _biases(node, foldings)
        if biases is not None:
            num, kv = node.attributes["num_heads"].as_int(), node.attributes["kv_num_heads"].as_int()
            q = np.linalg.norm(biases[0].reshape(kv, num // kv, -1), axis=-1)
            k = np.linalg.norm(biases[1].reshape(kv, 1, -1), axis=-1)
            found[_layer(node)] = float((q * k).max() * node.attributes["scale"].as_float())
    return found


def coarse_layers(scores: dict[int, float]) -> frozenset[int]:
    """Return the layers whose keys are to be centred."""
    return frozenset(layer for layer, score in scores.items() if score > COARSE_SCORE)


def _layer(node: ir.Node) -> int:
    past = node.inputs[3]
    assert past is not None
    return int((past.name or "").split(".")[1])


def _biases(node: ir.Node, foldings: Foldings) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the bias vectors of q [H * d] and k [K * d]; None where a projection has none."""
    packed = foldings.packed.get(node)
    if packed is None:
        vectors = [_bias_of(value) for value in node.inputs[:2]]
        return None if vectors[0] is None or vectors[1] is None else (vectors[0], vectors[1])
    vector = _bias_of(packed)
    if vector is None:
        return None
    num, kv = node.attributes["num_heads"].as_int(), node.attributes["kv_num_heads"].as_int()
    head = len(vector) // (num + 2 * kv)
    return vector[: num * head], vector[num * head : (num + kv) * head]


def _bias_of(value: ir.Value | None) -> np.ndarray | None:
    """Return the bias added last in what makes the value: that of a Linear, or of an Add behind a projection."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type == "Reshape" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None or node.op_type not in {"Linear", "Add"}:
        return None
    bias = next((v.const_value for v in reversed(node.inputs) if v is not None and v.const_value is not None), None)
    return bias.numpy().astype(np.float64).reshape(-1) if bias is not None and len(bias.shape) == 1 else None
