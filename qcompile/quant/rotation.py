"""Rotate a decoder's residual stream and its value heads, offline: the function stays, the outliers are spread.

With h the residual stream [.., D] and Q orthogonal, the model that carries h Q instead computes the same when every
operation that reads it undoes Q and every operation that writes it applies Q (QuaRot, Ashkboos et al. 2024, section 4;
SliceGPT, Ashkboos et al. 2024, theorem 1 for the norm):

    RmsNorm   x / rms(x) commutes with Q once its gamma is 1: fold gamma into the Linears that read it first
    reads     q, k, v, gate, up:   W [N, D] -> W diag(gamma) Q          `fold_norm`, `rotate_inputs`
    writes    o_proj, down_proj:   W [D, K] -> Q^T W, b -> b Q          `rotate_outputs`
              embedding            E [V, D] -> E Q                      `rotate_inputs` (rows are looked up, not applied)
    head      W [V, D] -> W diag(gamma) Q; tied to E, the head can keep the rotated table E Q when the final norm is
              followed by one small Linear Q^T diag(gamma) Q [D, D]     `rotated_norm`

LayerNorm subtracts a mean, which does not commute; Qwen has none. Values are mixed over tokens, never over channels, so a
rotation of each value head (d channels) undone in o_proj is free as well: `rotate_value_heads`. Queries and keys pass
through the rotary embedding, and down_proj's input through SwiGlu: nothing folds there, a rotation would cost time.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qcompile.errors import QuantError
from qcompile.quant.hadamard import Rotation
from qcompile.quant.scheme import FloatArray

Array = npt.NDArray[np.floating]


def fold_norm(gamma: Array, weight: Array) -> FloatArray:
    """Return W diag(gamma) for a Linear W [N, D] that reads the norm; the norm's own gamma becomes 1."""
    if weight.ndim != 2 or gamma.shape != weight.shape[1:]:
        raise QuantError(f"a norm of {list(gamma.shape)} does not feed a weight of {list(weight.shape)}")
    return np.asarray(weight, dtype=np.float32) * np.asarray(gamma, dtype=np.float32)


def rotate_inputs(weight: Array, rotation: Rotation) -> FloatArray:
    """Return W Q for a Linear W [N, D] that reads h Q, or for an embedding table [V, D]."""
    return rotation.apply(weight)


def rotate_outputs(weight: Array, bias: Array | None, rotation: Rotation) -> tuple[FloatArray, FloatArray | None]:
    """Return Q^T W and b Q for a Linear W [D, K], b [D] whose outputs are to be added to h Q."""
    return np.ascontiguousarray(rotation.apply(weight.T).T), None if bias is None else rotation.apply(bias)


def rotated_norm(gamma: Array, rotation: Rotation) -> FloatArray:
    """Return M [D, D] = Q^T diag(gamma) Q, symmetric: norm(h) diag(gamma) E^T = norm(h Q) M (E Q)^T."""
    rows = rotation.apply(np.diag(np.asarray(gamma, dtype=np.float32)))
    return rotation.apply(np.ascontiguousarray(rows.T))


def rotate_value_heads(
    value: tuple[Array, Array | None], output: Array, rotation: Rotation, num_heads: int
) -> tuple[FloatArray, FloatArray | None, FloatArray]:
    """Rotate the d channels of every value head, and undo it where o_proj reads them.

    Args:
        value: v_proj's weight [K * d, D] and bias [K * d] or None.
        output: o_proj's weight [D, H * d].
        rotation: Of d channels.
        num_heads: H.

    Returns:
        The new v_proj weight, v_proj bias and o_proj weight.
    """
    weight, bias = value
    size = rotation.size
    if weight.shape[0] % size or output.shape[1] != num_heads * size:
        raise QuantError(
            f"heads of {size} channels do not fit v_proj {list(weight.shape)} and o_proj {list(output.shape)}"
        )
    heads = rotation.apply(np.ascontiguousarray(weight.T).reshape(weight.shape[1], -1, size))
    new_weight = np.ascontiguousarray(heads.reshape(weight.shape[1], -1).T)
    new_bias = None if bias is None else rotation.apply(bias.reshape(-1, size)).reshape(-1)
    new_output = rotation.apply(output.reshape(output.shape[0], num_heads, size)).reshape(output.shape)
    return new_weight, new_bias, new_output
