"""Codes and scales that are improved one at a time: against loops, and at the place where nothing single helps any more."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from qcompile.quant import AlgorithmOptions, WeightScheme, quantize_weight
from qcompile.quant.coordinate_descent import descend
from qcompile.quant.output_error import output_error
from tests.quant.linears import inputs, statistics_of, weight

K = 48
SCHEMES = [
    WeightScheme(4, 16, scale_type="float16"),
    WeightScheme(4, 16, symmetric=False, scale_type="float16"),
    WeightScheme(4, 20),
    WeightScheme(4, 20, symmetric=False),
    WeightScheme(4),
    WeightScheme(8, 16, symmetric=False),
]
schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=WeightScheme.describe)


def damped(x):
    hessian = x.T @ x
    return hessian + 0.01 * np.mean(np.diag(hessian)) * np.eye(len(hessian), dtype=np.float32)


def start_of(matrix, scheme, algorithm="rtn"):
    options = AlgorithmOptions(sweeps=0)
    return quantize_weight(matrix, scheme, algorithm, statistics_of(inputs(300, matrix.shape[1])), options=options)


def error_of(matrix, quantized, hessian):
    return output_error((matrix - quantized.dequantize()).astype(np.float64), hessian.astype(np.float64))


def zero_points_of(quantized):
    """[N, K] in float64."""
    if quantized.zero_points is None:
        return np.zeros(quantized.codes.shape)
    group = quantized.scheme.group_of(quantized.codes.shape[1])
    return np.repeat(quantized.zero_points.astype(np.float64), group, axis=1)[:, : quantized.codes.shape[1]]


def one_sweep(matrix, start, hessian):
    """The formulas, one row and one number at a time."""
    matrix, hessian = matrix.astype(np.float64), hessian.astype(np.float64)
    scheme, group_size = start.scheme, start.scheme.group_of(matrix.shape[1])
    zeros, scales = zero_points_of(start), start.scales.astype(np.float64)
    codes = start.codes - zeros
    low, high = scheme.code_range
    for row in range(len(matrix)):
        for group in range(scales.shape[1]):
            own = range(group * group_size, min((group + 1) * group_size, matrix.shape[1]))

            def errors(row=row):
                return matrix[row] - codes[row] * np.repeat(scales[row], group_size)[: matrix.shape[1]]

            member = np.zeros(matrix.shape[1])
            member[own.start : own.stop] = codes[row, own.start : own.stop]
            across = member @ hessian @ member
            if across > 0:
                old = scales[row, group]
                new = float(scheme.stored_scales(np.float32(old + member @ hessian @ errors() / across)[None])[0])
                before = errors() @ hessian @ errors()
                scales[row, group] = new
                if not errors() @ hessian @ errors() < before:
                    scales[row, group] = old
            for k in own:
                e, s = errors(), scales[row, group]
                best = codes[row, k] + hessian[k] @ e / (s * hessian[k, k])
                codes[row, k] = np.clip(np.rint(best) + zeros[row, k], low, high) - zeros[row, k]
    return codes + zeros, scales


@pytest.mark.parametrize("block", [5, 128])
@schemes
def test_a_sweep_is_that_of_the_formulas(scheme, block):
    matrix, hessian = weight(10, K), damped(inputs(300, K))
    start = start_of(matrix, scheme)
    found = descend(matrix, start, hessian, 1, block)
    codes, scales = one_sweep(matrix, start, hessian)
    assert (found.codes == codes).mean() > 0.99
    assert np.isclose(found.scales, scales, rtol=1e-3).mean() > 0.99
    assert np.array_equal(found.scales, scheme.stored_scales(found.scales))
    assert (found.zero_points is None) == scheme.symmetric


@pytest.mark.parametrize("algorithm", ["rtn", "mse", "clip", "gptq"])
@schemes
def test_no_sweep_raises_the_error(scheme, algorithm):
    matrix, hessian = weight(32, K), damped(inputs(300, K))
    start = start_of(matrix, scheme, algorithm)
    errors = [error_of(matrix, descend(matrix, start, hessian, sweeps, 128), hessian) for sweeps in range(5)]
    assert errors[0] == error_of(matrix, start, hessian)
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(errors))
    assert errors[1] < (0.98 if algorithm == "gptq" else 0.8) * errors[0]


@schemes
def test_in_the_end_no_single_code_or_scale_can_be_better(scheme):
    matrix, hessian = weight(6, 24), damped(inputs(300, 24))
    found = descend(matrix, start_of(matrix, scheme, "gptq"), hessian, 60, 128)
    least = error_of(matrix, found, hessian)
    low, high = scheme.code_range
    for row, column in np.ndindex(found.codes.shape):
        for step in (-1, 1):
            code = int(found.codes[row, column]) + step
            if low <= code <= high:
                codes = found.codes.copy()
                codes[row, column] = code
                assert error_of(matrix, replace(found, codes=codes), hessian) >= least * (1 - 1e-5)
    for row, group in np.ndindex(found.scales.shape):
        for factor in (0.997, 1.003):
            scales = found.scales.copy()
            scales[row, group] *= factor
            assert error_of(matrix, replace(found, scales=scales), hessian) >= least * (1 - 1e-5)


def test_gptq_ends_with_it():
    matrix, statistics, scheme = weight(16, K), statistics_of(inputs(300, K)), WeightScheme(4, 16)
    alone = quantize_weight(matrix, scheme, "gptq", statistics, options=AlgorithmOptions(sweeps=0))
    wanted = descend(matrix, alone, damped(inputs(300, K)), AlgorithmOptions().sweeps, 128)
    found = quantize_weight(matrix, scheme, "gptq", statistics)
    assert (found.codes == wanted.codes).mean() > 0.99
    assert not np.array_equal(found.codes, alone.codes)


def test_groups_of_zeros_stay():
    matrix, hessian = weight(8, K), damped(inputs(300, K))
    matrix[:, 16:32] = 0
    start = start_of(matrix, WeightScheme(4, 16))
    start.scales[:, 1] = 1
    found = descend(matrix, start, hessian, 2, 128)
    assert np.isfinite(found.scales).all()
    assert (found.scales != 0).all()
