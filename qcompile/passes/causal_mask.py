"""Decide whether a value in a graph is the causal mask with padding: by what it holds in every case, not by its making."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.cases import Case
from qcompile.passes.rule import FusionRule, Reject

# exp(-1e4) is 0 in every float type.
_BLOCKED = -1e4


def require_causal(rule: FusionRule, mask: ir.Value) -> None:
    """Reject unless a mask hides exactly what lies in the future or is padding.

    It may be boolean (true: visible), or a number added to the scores (0: visible, very low: hidden). What it says of
    query rows that are padding does not matter.
    """
    arrays = rule.analysis.values(mask)
    if arrays is None:
        raise Reject(f"mask '{mask.name}' does not hang on attention_mask, position_ids and shapes alone")
    # The long case last: a window shorter than a few tokens is told with small numbers.
    for case, array in zip(rule.analysis.cases, arrays, strict=True):
        shape = (case.batch_size, 1, case.sequence_length, case.total_length)
        try:
            seen = np.broadcast_to(array, shape)
        except ValueError:
            raise Reject(f"mask '{mask.name}' is {list(array.shape)} in {case.name}, wanted {list(shape)}") from None
        reason = _difference(seen, case)
        if reason:
            raise Reject(f"mask '{mask.name}' is not just causal and padding: {reason} ({case.name})")


def _difference(mask: np.ndarray, case: Case) -> str:
    """Say how a mask [B, 1, S, T] differs from causal and padding; empty when it does not."""
    matters = np.broadcast_to(case.query_is_token()[:, None, :, None], mask.shape)
    wanted = np.broadcast_to(case.causal_mask()[:, None], mask.shape)
    if mask.dtype == np.bool_:
        is_open, is_closed = mask, ~mask
    else:
        is_open, is_closed = mask == 0, mask <= _BLOCKED
    if (~is_open & ~is_closed & matters).any():
        odd = mask[~is_open & ~is_closed & matters].reshape(-1)[0]
        return f"it adds {float(odd):g} to a score, as position biases do"
    hidden = wanted & matters & ~is_open
    if hidden.any():
        row, _, query, key = (int(axis[-1]) for axis in np.nonzero(hidden))
        distance = case.past_length + query - key
        if not hidden[row, 0, query, key + 1 :].any() and is_open[row, 0, query, case.past_length + query]:
            return f"it hides keys {distance} and more positions back, as a sliding window does"
        return f"it hides the key {distance} positions back"
    seen = ~wanted & matters & ~is_closed
    if seen.any():
        row, _, query, key = (int(axis[0]) for axis in np.nonzero(seen))
        is_future = key > case.past_length + query
        return "queries see later tokens" if is_future else "queries see padding"
    return ""
