"""Norms of a rotated residual stream: what they give can be rounded by one step that needs no data.

    y = RmsNorm(h Q; 1)      mean square 1 in every row; behind the random Hadamard matrix Q no channel is much larger than
                             the others, and the elements are nearly normal

Without the rotation a gamma of ones says nothing: a row with one large channel reaches sqrt(D). So `rotate-residual` leaves
a mark on the norms that it turned, which is stored with the graph; and a gamma that was changed since (`smooth-quant` and
`awq` fold scales into it) makes a norm as good as any other.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from qcompile.functions import DOMAIN, GAMMA_INPUTS
from qcompile.quantize_options import LinearScheme

_MARK, _ROTATED = "qcompile.residual", "rotated"


def mark_rotated(norm: ir.Node) -> None:
    """Note on a norm that the residual stream it reads is rotated."""
    norm.metadata_props[_MARK] = _ROTATED


def is_rotated(norm: ir.Node) -> bool:
    """Whether the residual stream that a norm reads was rotated, in this run or an earlier one."""
    return norm.metadata_props.get(_MARK) == _ROTATED


def is_unit_norm(x: ir.Value | None) -> bool:
    """Whether a value is what a norm with a gamma of ones makes of a rotated residual stream."""
    norm = x.producer() if x is not None else None
    if norm is None or norm.domain != DOMAIN or norm.op_type not in GAMMA_INPUTS or norm.outputs[0] is not x:
        return False
    gamma = norm.inputs[GAMMA_INPUTS[norm.op_type]]
    if not is_rotated(norm) or gamma is None or gamma.const_value is None:
        return False
    return bool(np.all(gamma.const_value.numpy() == 1))


def scheme_for_input(scheme: LinearScheme, x: ir.Value | None, *, rounds_per_token: bool) -> LinearScheme:
    """Return what a scheme comes to for an input: ``norm`` is for unit norms alone.

    Args:
        scheme: What was asked for.
        x: What the projection reads.
        rounds_per_token: Whether the target has kernels for a step per token, which is what other inputs then get.
    """
    if scheme.activations != "norm" or is_unit_norm(x):
        return scheme
    return replace(scheme, activations="dynamic" if rounds_per_token else "static")
