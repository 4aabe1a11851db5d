"""Move a scale per input channel into the operation before, so that a Linear sees x / s and its weight becomes W s.

    y = x W^T = (x / s) (W diag(s))^T

and x / s costs nothing where x comes from

- a norm:    x = normal * gamma (+ beta)    ->  gamma / s (and beta / s)
- a Linear:  x = z V^T + c                  ->  rows of V and c divided by s
- SwiGlu:    x = silu(gate) * up            ->  rows of the up projection divided by s; the gate is not linear
- attention: x = a mix of value rows        ->  rows of v_proj divided by s; with grouped queries H > K all heads of a
  group read the same values, so s must agree over them: `share_over_query_heads`.

Every Linear that reads x must be multiplied by the same s (q, k and v; gate and up).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from qcompile.errors import QuantError
from qcompile.quant.scheme import FloatArray

Array = npt.NDArray[np.floating]


def divide_norm(gamma: Array, scale: FloatArray) -> Array:
    """Return gamma / s [K] (or beta / s) in the type it came in."""
    return _checked(gamma, scale, axis=0) / scale.astype(gamma.dtype)


def divide_outputs(weight: Array, bias: Array | None, scale: FloatArray) -> tuple[Array, Array | None]:
    """Return V / s and c / s for the Linear V [N, M], c [N] whose outputs are to be divided by s [N]."""
    divided = _checked(weight, scale, axis=0) / scale.astype(weight.dtype)[:, None]
    return divided, None if bias is None else _checked(bias, scale, axis=0) / scale.astype(bias.dtype)


def multiply_inputs(weight: Array, scale: FloatArray) -> Array:
    """Return W diag(s) for a Linear W [N, K] that will read x / s."""
    return _checked(weight, scale, axis=1) * scale.astype(weight.dtype)


def share_over_query_heads(
    values: FloatArray,
    num_heads: int,
    kv_heads: int,
    reduce: Callable[..., FloatArray] = np.max,
) -> FloatArray:
    """Make a value per o_proj input [H * d] agree over the query heads that read the same value head.

    Args:
        values: float32 [H * d], head by head.
        num_heads: H.
        kv_heads: K.
        reduce: How the heads of a group become one: np.max, np.mean, ... taking `axis`.

    Returns:
        float32 [H * d]; `own_value_channels` reduces it to one entry per v_proj output.
    """
    by_group = _by_group(values, num_heads, kv_heads)
    return np.ascontiguousarray(np.broadcast_to(reduce(by_group, axis=1)[:, None], by_group.shape)).reshape(-1)


def own_value_channels(shared: FloatArray, num_heads: int, kv_heads: int) -> FloatArray:
    """Return [K * d], one value per v_proj output, from what `share_over_query_heads` returned."""
    return np.ascontiguousarray(_by_group(shared, num_heads, kv_heads)[:, 0]).reshape(-1)


def _by_group(values: FloatArray, num_heads: int, kv_heads: int) -> FloatArray:
    if num_heads % kv_heads or len(values) % num_heads:
        raise QuantError(f"{len(values)} channels are not {num_heads} heads over {kv_heads} key/value heads")
    return values.reshape(kv_heads, num_heads // kv_heads, -1)


def _checked(array: Array, scale: FloatArray, axis: int) -> Array:
    if scale.ndim != 1 or array.shape[axis] != len(scale):
        raise QuantError(f"a scale of shape {list(scale.shape)} does not fit axis {axis} of {list(array.shape)}")
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise QuantError("a scale to fold must be positive and finite")
    return array
