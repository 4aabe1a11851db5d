import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qcompile.quant import AlgorithmOptions, WeightScheme, quantize_weight
from qcompile.quant.mse import search_scales
from tests.quant.linears import weight

SCHEMES = [WeightScheme(bits, group, symmetric) for bits in (4, 8) for group in (16, 20, None) for symmetric in (1, 0)]


def group_errors(matrix, quantized):
    squared = (matrix.astype(np.float64) - quantized.dequantize()) ** 2
    group = quantized.scheme.group_of(matrix.shape[1])
    return np.add.reduceat(squared, np.arange(0, matrix.shape[1], group), axis=1)


def obvious_search(values, scheme, options):
    """Try every scale of the documented grid on one group, one value at a time; return the least squared error."""
    low, high = scheme.code_range
    tries = []
    for ratio in np.linspace(1, options.smallest_ratio, options.num_steps):
        if scheme.symmetric:
            widest = max(abs(v) for v in values) / high
            signs = (1, -1) if -low != high else (1,)
            tries += [(sign * widest * ratio * high / -low, 0) for sign in signs]
            tries.append((widest, 0))
        else:
            bottom, top = min(*values, 0.0), max(*values, 0.0)
            scale = ratio * (top - bottom) / high
            tries.append((scale, round(-bottom * high / (top - bottom))))
    return min(
        sum((v - scale * (min(max(round(v / scale) + zero, low), high) - zero)) ** 2 for v in values)
        for scale, zero in tries
    )


@pytest.mark.parametrize("scheme", SCHEMES, ids=WeightScheme.describe)
def test_no_group_is_worse_than_the_obvious_search_or_than_round_to_nearest(scheme):
    matrix = weight(6, 50)
    options = AlgorithmOptions(num_steps=12)
    errors = group_errors(matrix, quantize_weight(matrix, scheme, "mse", options=options))
    assert (errors <= group_errors(matrix, quantize_weight(matrix, scheme)) * (1 + 1e-5)).all()
    group = scheme.group_of(50)
    for row in range(6):
        for index, start in enumerate(range(0, 50, group)):
            values = [float(v) for v in matrix[row, start : start + group]]
            assert errors[row, index] <= obvious_search(values, scheme, options) * (1 + 1e-4)


@settings(max_examples=40, deadline=None)
@given(arrays(np.float32, (3, 24), elements=st.floats(-1e5, 1e5, width=32)), st.sampled_from(SCHEMES))
def test_it_never_loses_to_round_to_nearest(matrix, scheme):
    searched, plain = (quantize_weight(matrix, scheme, algorithm) for algorithm in ("mse", "rtn"))
    assert (group_errors(matrix, searched) <= group_errors(matrix, plain) * (1 + 1e-4) + 1e-12).all()
    assert np.isfinite(searched.dequantize()).all()


def test_four_bits_gain_and_the_sign_of_a_scale_is_used():
    matrix = weight(64, 256)
    scheme = WeightScheme(4, 32)
    searched, plain = (quantize_weight(matrix, scheme, algorithm) for algorithm in ("mse", "rtn"))
    assert group_errors(matrix, searched).sum() < 0.8 * group_errors(matrix, plain).sum()
    assert (searched.scales < 0).any()
    assert (searched.codes == -8).any()


def test_importance_moves_the_error_to_where_it_counts_less():
    matrix, scheme = weight(32, 64), WeightScheme(4, 64)
    importance = np.ones(64, np.float32)
    importance[:8] = 1000
    plain = quantize_weight(matrix, scheme, "mse").dequantize()
    scales, zeros = search_scales(matrix, scheme, AlgorithmOptions(), importance)
    codes = np.clip(np.rint(matrix / scales), -8, 7) * scales
    assert zeros is None
    assert ((codes - matrix)[:, :8] ** 2).sum() < 0.8 * ((plain - matrix)[:, :8] ** 2).sum()


def test_another_exponent_is_another_objective():
    matrix, scheme = weight(16, 64), WeightScheme(4, 64)
    errors = {}
    for exponent in (2.0, 4.0):
        found = quantize_weight(matrix, scheme, "mse", options=AlgorithmOptions(exponent=exponent))
        errors[exponent] = np.abs(found.dequantize() - matrix)
    assert (errors[4.0] ** 4).sum() < (errors[2.0] ** 4).sum()
    assert (errors[2.0] ** 2).sum() < (errors[4.0] ** 2).sum()


def test_many_blocks_of_rows_are_the_same_as_one(monkeypatch):
    matrix, scheme = weight(50, 64), WeightScheme(4, 16, symmetric=False)
    whole = quantize_weight(matrix, scheme, "mse")
    monkeypatch.setattr("qcompile.quant.mse._BLOCK_ELEMENTS", 64 * 7)
    pieces = quantize_weight(matrix, scheme, "mse")
    assert np.array_equal(whole.codes, pieces.codes)
    assert np.array_equal(whole.zero_points, pieces.zero_points)
    assert np.array_equal(whole.scales, pieces.scales)
