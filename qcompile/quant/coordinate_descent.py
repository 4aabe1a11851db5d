"""Coordinate descent on codes and scales that an algorithm has chosen, towards the least error of the outputs.

    f = tr(E H E^T),   E = W - W',   w'_k = s_g (q_k - z_g)

f is a parabola in every single code and in every single scale, so each has an exact best value while all others stay:

    q_k  = round(w'_k / s_g + P_k / (s_g H_kk)) + z_g                         P = E H   (a row of it: one output)
    s_g += sum of (q_k - z_g) P_k / sum of (q_j - z_g) H_jk (q_k - z_g)       j, k over the group

(codes: Behdin et al. 2023, "QuantEase"; scales: the second stage of Kim et al. 2026, "Two-Stage Grid
Optimization for Group-wise Quantization of LLMs"). No step raises f, whatever the codes came from. GPTQ looks only ahead:
a code is chosen while those before it are fixed and those after it are free. Here every code is looked at again with all
others as they are, and every scale with the codes that it really has.

A sweep goes through the groups in order: its scales, then its codes, one input at a time for all outputs. P comes from one
matrix product for a panel of b inputs, which holds one group or several, and is kept right within it. Floor of a sweep in
multiply-adds, N outputs, K inputs: N K^2 for P, and N K b / 2 to keep it right. Zero points stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from qcompile.quant.rtn import nearest_codes
from qcompile.quant.scheme import FloatArray, QuantizedWeight


def descend(
    weight: FloatArray, start: QuantizedWeight, hessian: FloatArray, sweeps: int, block: int
) -> QuantizedWeight:
    """Return the weight after some sweeps, its output error no larger than at the start.

    Args:
        weight: float32 [N, K], checked.
        start: Its codes and scales.
        hessian: float32 [K, K], positive definite: H with its damping.
        sweeps: How often to go through all groups; 0 returns the start.
        block: Inputs of a panel.
    """
    if not sweeps:
        return start
    descent = _Descent(weight, start, hessian, block)
    for _ in range(sweeps):
        descent.sweep()
    return descent.result()


class _Descent:
    """The state, transposed as in GPTQ: input k is row k."""

    def __init__(self, weight: FloatArray, start: QuantizedWeight, hessian: FloatArray, block: int) -> None:
        self.scheme, self.hessian, self.block = start.scheme, hessian, block
        self.group_size = start.scheme.group_of(weight.shape[1])
        self.scales = start.scales.T.copy()
        self.zero_points = start.zero_points
        self.codes = np.ascontiguousarray(start.codes.T).astype(np.float32)
        self.errors = np.ascontiguousarray((weight - start.dequantize()).T)

    def sweep(self) -> None:
        groups = range(len(self.scales))
        in_a_panel = max(1, self.block // self.group_size)
        for first in groups[::in_a_panel]:
            self._improve_panel(groups[first : first + in_a_panel])

    def _improve_panel(self, groups: range) -> None:
        panel = self._inputs_of(groups)
        slopes = self.hessian[panel] @ self.errors
        for place, group in enumerate(groups):
            own = self._inputs_of(groups[place : place + 1])
            its_slopes = slopes[own.start - panel.start : own.stop - panel.start]
            with self._change_of(own, panel, slopes):
                self._improve_scales(group, own, its_slopes)
                self._improve_group(group, own, its_slopes)

    def _inputs_of(self, groups: range) -> slice:
        return slice(groups[0] * self.group_size, min((groups[-1] + 1) * self.group_size, len(self.codes)))

    def _improve_group(self, group: int, own: slice, slopes: FloatArray) -> None:
        for first in range(own.start, own.stop, self.block):
            part = slice(first, min(first + self.block, own.stop))
            with self._change_of(part, own, slopes):
                self._improve_codes(group, part, slopes[first - own.start : part.stop - own.start])

    @contextmanager
    def _change_of(self, part: slice, whole: slice, slopes: FloatArray) -> Iterator[None]:
        """Add to the slopes of the inputs after a part, up to the end of the whole, what the part's errors change by."""
        if part.stop == whole.stop:
            yield
            return
        before = self.errors[part].copy()
        yield
        rest = slice(part.stop, whole.stop)
        slopes[part.stop - whole.start :] += self.hessian[rest, part] @ (self.errors[part] - before)

    def result(self) -> QuantizedWeight:
        codes = np.ascontiguousarray(self.codes.T).astype(self.scheme.code_type)
        return QuantizedWeight(codes, np.ascontiguousarray(self.scales.T), self.zero_points, self.scheme)

    def _zero(self, group: int) -> FloatArray:
        """Return the code of zero of a group, [N] or [1]."""
        return np.zeros(1, np.float32) if self.zero_points is None else self.zero_points[:, group].astype(np.float32)

    def _improve_scales(self, group: int, own: slice, slopes: FloatArray) -> None:
        """Move the scales of a group, and its errors and slopes with them, where the stored scale is better too."""
        codes = self.codes[own] - self._zero(group)
        turned = self.hessian[own, own] @ codes
        along, across = np.einsum("kn,kn->n", codes, slopes), np.einsum("kn,kn->n", codes, turned)
        old = self.scales[group]
        wanted = old + np.divide(along, across, out=np.zeros_like(along), where=across > 0)
        step = self.scheme.stored_scales(wanted) - old
        step[~(step * (step * across - 2 * along) < 0)] = 0  # what it changes f by
        self.scales[group] = old + step
        self.errors[own] -= codes * step
        slopes -= turned * step

    def _improve_codes(self, group: int, part: slice, slopes: FloatArray) -> None:
        """Move the codes of some inputs of a group, in order."""
        scales, zero = self.scales[group], self._zero(group)
        zero_points = None if self.zero_points is None else self.zero_points[:, group]
        for place, column in enumerate(range(part.start, part.stop)):
            row = self.hessian[column]
            best = (self.codes[column] - zero) * scales + slopes[place] / row[column]
            codes = nearest_codes(best, scales, zero_points, self.scheme)
            change = (self.codes[column] - codes) * scales
            self.codes[column] = codes
            self.errors[column] += change
            slopes[place + 1 :] += row[column + 1 : part.stop, None] * change
