"""GPTQ: round one input at a time and let those not yet rounded make up for the error.

    minimise tr(E H E^T),  E = W - W',  H = sum of x x^T + damping * mean(diag H) * I

Frantar et al. 2022 ("GPTQ", eq. 2 and 3, algorithm 1) subtract the scaled error from the columns to come, with rows of the
upper Cholesky factor of H^-1. Chee et al. 2023 ("QuIP", theorem 6) show that the same roundings come out of H itself:

    H = (I + U) D (I + U)^T,   U strictly upper triangular
    w'_k = round(w_k + sum over j < k of e_j U_jk)

because tr(E H E^T) = sum over k of D_k |e_k + sum_j e_j U_jk|^2. This form needs no inverse and only reads what is
finished, so a block of columns takes its correction from all blocks before it by one matrix product.

`act_order` rounds the inputs with the largest H_kk first, while there are still many to make up for it. Groups stay where
they are in the row; their scales come before the rounding from the MSE search. Without `act_order` they come from the
corrected weights, when a group's first column is reached. The search does not weigh errors by H_kk: what is rounded later
is not the weight that was searched on, and on a real model weighing gave up to 39 % more output error.

What comes out is improved by coordinate descent with the same H (`qcompile.quant.coordinate_descent`).

Floor, in multiply-adds for N outputs, K inputs and T tokens: T K^2 / 2 for H (its upper half is summed), K^3 / 6 for its
Cholesky factor in float64, N K^2 / 2 for the corrections. Qwen2.5-0.5B, 32,768 tokens: 1.0e13 + 4.7e11 + 3.6e11, and
1.2e13 for the forward pass that makes the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcompile.errors import QuantError
from qcompile.quant.coordinate_descent import descend
from qcompile.quant.mse import search_scales
from qcompile.quant.rtn import GroupScales, nearest_codes
from qcompile.quant.scheme import AlgorithmOptions, FloatArray, QuantizedWeight, WeightScheme


@dataclass(frozen=True)
class GptqFactor:
    """What GPTQ needs to know about a Linear's inputs, computed once for all its rows.

    Attributes:
        order: int [K], the inputs in the order in which they are rounded.
        upper: float32 [K, K], U in that order.
        hessian: float32 [K, K], H with its damping, in the inputs' own order.
    """

    order: npt.NDArray[np.intp]
    upper: FloatArray
    hessian: FloatArray

    @classmethod
    def of(cls, hessian: FloatArray, options: AlgorithmOptions, name: str = "weight") -> GptqFactor:
        """Factor H [K, K].

        Raises:
            QuantError: H has NaN or infinite values, or is no sum of x x^T at this damping.
        """
        if not np.isfinite(hessian).all():
            raise QuantError(f"{name}: the calibration saw NaN or infinite inputs; keep this layer float")
        diagonal = hessian.diagonal().astype(np.float64)
        mean = float(diagonal.mean())
        # Inputs that were always zero say nothing: their columns round by themselves.
        damped = diagonal + (options.damping * mean if mean > 0 else 1.0)
        order = np.argsort(-damped, kind="stable") if options.act_order else np.arange(len(hessian))
        backward = order[::-1]
        matrix = hessian[np.ix_(backward, backward)].astype(np.float64)
        np.fill_diagonal(matrix, damped[backward])
        try:
            lower = np.linalg.cholesky(matrix)
        except np.linalg.LinAlgError as error:
            raise QuantError(
                f"{name}: the inputs' second moments have no Cholesky factor at damping {options.damping}; "
                "raise the damping (0.05, say) or calibrate on more text"
            ) from error
        lower /= lower.diagonal()
        upper = lower[::-1, ::-1].astype(np.float32)
        np.fill_diagonal(upper, 0.0)
        own_order = hessian.copy()
        np.fill_diagonal(own_order, damped)
        return cls(order, upper, own_order)


def gptq(weight: FloatArray, scheme: WeightScheme, factor: GptqFactor, options: AlgorithmOptions) -> QuantizedWeight:
    """Quantize a checked weight [N, K] (or some rows of one) with the factor of its inputs."""
    rounding = _Rounding(weight, scheme, factor, options)
    for start in range(0, weight.shape[1], options.block_size):
        rounding.round_block(start, min(start + options.block_size, weight.shape[1]))
    return descend(weight, rounding.result(), factor.hessian, options.sweeps, options.block_size)


class _Rounding:
    """The state of one run, transposed: column k of the order is row k, so that what a step touches is contiguous."""

    def __init__(self, weight: FloatArray, scheme: WeightScheme, factor: GptqFactor, options: AlgorithmOptions) -> None:
        self.scheme, self.factor, self.options = scheme, factor, options
        num_outputs, num_inputs = weight.shape
        self.group_of = factor.order // scheme.group_of(num_inputs)
        self.weight = np.ascontiguousarray(weight[:, factor.order].T)
        self.errors = np.zeros_like(self.weight)
        self.codes = np.empty((num_inputs, num_outputs), dtype=scheme.code_type)
        groups = scheme.num_groups(num_inputs)
        self.scales = np.ones((groups, num_outputs), dtype=np.float32)
        self.zero_points = None if scheme.symmetric else np.zeros((groups, num_outputs), dtype=np.uint8)
        self.has_own_scales = not options.act_order and groups > 1
        if not self.has_own_scales:
            self._set_scales(slice(0, groups), search_scales(weight, scheme, options))

    def round_block(self, start: int, stop: int) -> None:
        upper = self.factor.upper
        target = self.weight[start:stop] + upper[:start, start:stop].T @ self.errors[:start]
        within = np.ascontiguousarray(upper[start:stop, start:stop].T)
        for column in range(start, stop):
            group = int(self.group_of[column])
            if self.has_own_scales and (column == 0 or group != self.group_of[column - 1]):
                self._search_group(group, column)
            place = column - start
            wanted = target[place] + within[place, :place] @ self.errors[start:column]
            zero = None if self.zero_points is None else self.zero_points[group]
            codes = nearest_codes(wanted, self.scales[group], zero, self.scheme)
            self.codes[column] = codes
            if zero is not None:
                codes -= zero
            self.errors[column] = self.weight[column] - codes * self.scales[group]

    def result(self) -> QuantizedWeight:
        codes = np.empty_like(self.codes)
        codes[self.factor.order] = self.codes
        zero_points = None if self.zero_points is None else np.ascontiguousarray(self.zero_points.T)
        scales = np.ascontiguousarray(self.scales.T)
        return QuantizedWeight(np.ascontiguousarray(codes.T), scales, zero_points, self.scheme)

    def _set_scales(self, where: slice, found: GroupScales) -> None:
        scales, zero_points = found
        self.scales[where] = scales.T
        if self.zero_points is not None and zero_points is not None:
            self.zero_points[where] = zero_points.T

    def _search_group(self, group: int, column: int) -> None:
        """Search a group's scales on its weights as they should be, given the errors of all columns before it.

        With C the correction of the group's columns, those are w + C (I + U_gg)^-1: what the paper's algorithm has
        there by then, every column made up for on the assumption that the rest of the group will not be rounded.
        """
        stop = column + int(np.searchsorted(self.group_of[column:], group + 1))
        own = slice(column, stop)
        correction = self.factor.upper[:column, own].T @ self.errors[:column]
        unit = self.factor.upper[own, own] + np.eye(stop - column, dtype=np.float32)
        corrected = self.weight[own] + np.linalg.solve(unit.T, correction)
        whole = WeightScheme(self.scheme.bits, None, self.scheme.symmetric, self.scheme.scale_type)
        found = search_scales(np.ascontiguousarray(corrected.T), whole, self.options)
        self._set_scales(slice(group, group + 1), found)
