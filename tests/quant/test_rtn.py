from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qcompile.errors import QuantError
from qcompile.quant import WeightScheme, quantize_weight, weight_quantizer

WEIGHTS = arrays(np.float32, (4, 40), elements=st.floats(-1e4, 1e4, width=32))
SCHEMES = st.builds(WeightScheme, st.sampled_from([4, 8]), st.sampled_from([None, 8, 16, 40, 64]), st.booleans())


@given(WEIGHTS, SCHEMES)
def test_error_is_at_most_half_a_step_and_one_where_the_zero_point_was_rounded(weight, scheme):
    quantized = quantize_weight(weight, scheme)
    group = scheme.group_of(40)
    step = np.repeat(quantized.scales, group, axis=1)[:, :40].astype(np.float64)
    allowed = 0.5 if scheme.symmetric else 1.0
    error = np.abs(weight.astype(np.float64) - quantized.dequantize())
    assert (error <= step * (allowed + 1e-5) * (np.abs(weight) >= 1e-36) + 1e-36).all()


@given(WEIGHTS, SCHEMES)
def test_zero_stays_zero_and_codes_stay_in_range(weight, scheme):
    weight[:, 3] = 0
    quantized = quantize_weight(weight, scheme)
    low, high = scheme.code_range
    assert (quantized.dequantize()[:, 3] == 0).all()
    assert quantized.codes.dtype == scheme.code_type
    assert quantized.codes.min() >= low
    assert quantized.codes.max() <= high
    assert (quantized.scales > 0).all()


@given(WEIGHTS, st.sampled_from([4, 8]))
def test_quantizing_twice_changes_nothing(weight, bits):
    scheme = WeightScheme(bits, 8)
    quantized = quantize_weight(weight, scheme)
    again = quantize_weight(quantized.dequantize(), scheme)
    assert np.array_equal(quantized.codes, again.codes)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [8, 12, None])
def test_agrees_with_an_obvious_loop(bits, symmetric, group_size):
    weight = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    scheme = WeightScheme(bits, group_size, symmetric)
    quantized = quantize_weight(weight, scheme)
    size = group_size or 32
    for row in range(3):
        for group, start in enumerate(range(0, 32, size)):
            values = [float(v) for v in weight[row, start : start + size]]
            low, high = min(*values, 0.0), max(*values, 0.0)
            scale = max(-low, high) / (2 ** (bits - 1) - 1) if symmetric else (high - low) / (2**bits - 1)
            zero_point = 0 if symmetric else round(-low / scale)
            assert quantized.scales[row, group] == pytest.approx(scale, rel=1e-6)
            if quantized.zero_points is not None:
                assert quantized.zero_points[row, group] == zero_point
            for i, value in enumerate(values):
                code = round(value / float(quantized.scales[row, group])) + zero_point
                assert quantized.codes[row, start + i] == min(max(code, scheme.code_range[0]), scheme.code_range[1])


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_of_zeros_stays_zero(symmetric):
    weight = np.zeros((2, 32), np.float32)
    weight[1, 16:] = 1.0
    quantized = quantize_weight(weight, WeightScheme(8, 16, symmetric))
    assert np.isfinite(quantized.scales).all()
    assert np.array_equal(quantized.dequantize(), weight)


def test_a_short_last_group_is_quantized_by_itself():
    weight = np.concatenate([np.full((1, 32), 100.0), np.full((1, 8), 0.1)], axis=1).astype(np.float32)
    quantized = quantize_weight(weight, WeightScheme(8, 32))
    assert quantized.scales.shape == (1, 2)
    assert np.allclose(quantized.dequantize(), weight, rtol=1e-6)


@pytest.mark.parametrize(("scale_type", "dtype"), [("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)])
def test_scales_are_numbers_of_the_type_that_will_hold_them(scale_type, dtype):
    weight = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)
    weight[0, :16] = 1e-7
    scales = quantize_weight(weight, WeightScheme(8, 16, scale_type=scale_type)).scales
    assert np.array_equal(scales.astype(dtype).astype(np.float32), scales)
    assert (scales.astype(dtype) != 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("largest", [1.2e-4, 2e-5, 3e-6, 1e-7])
def test_small_weights_keep_what_half_precision_scales_have_bits_for(largest, symmetric):
    weight = np.random.default_rng(3).uniform(-largest, largest, (4, 64)).astype(np.float32)
    quantized = quantize_weight(weight, WeightScheme(8, 16, symmetric, "float16"))
    assert (np.abs(quantized.dequantize() - weight) <= quantized.scales.max() * (0.501 if symmetric else 1)).all()
    assert quantized.scales.max() <= largest / 127 + 2.0**-24
    assert np.array_equal(quantized.scales.astype(np.float16).astype(np.float32), quantized.scales)


def test_a_type_holds_scales_of_four_bits_up_to_its_largest_number():
    half = WeightScheme(8, 16, scale_type="float16")
    assert half.holds(np.array([[0, 1e-6, 65504]], np.float32))
    assert not half.holds(np.array([[1, 9e-7]], np.float32))
    assert not half.holds(np.array([[1, 7e4]], np.float32))
    assert replace(half, scale_type="float32").holds(np.array([[1e-30, 7e4]], np.float32))


def test_the_size_counts_codes_scales_and_zero_points():
    assert WeightScheme(8).size_bytes(10, 64) == 10 * (64 + 4)
    assert WeightScheme(4, 32).size_bytes(10, 64) == 10 * (32 + 8)
    assert WeightScheme(4, 32, symmetric=False, scale_type="float16").size_bytes(10, 96) == 10 * (48 + 6 + 2)
    assert WeightScheme(4, 64).size_bytes(1, 96) == 64 + 8


def test_rows_in_pieces_are_the_rows_of_the_whole():
    weight = np.random.default_rng(2).standard_normal((10, 48)).astype(np.float32)
    scheme = WeightScheme(4, 16, symmetric=False)
    quantize, whole = weight_quantizer(scheme), quantize_weight(weight, scheme)
    for start in range(0, 10, 3):
        piece, wanted = quantize(weight[start : start + 3]), whole.rows(start, start + 3)
        assert np.array_equal(piece.codes, wanted.codes)
        assert np.array_equal(piece.scales, wanted.scales)
        assert np.array_equal(piece.zero_points, wanted.zero_points)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_by_name(bad):
    weight = np.ones((3, 16), np.float32)
    weight[2, 5] = bad
    with pytest.raises(QuantError, match=r"layers.0.mlp: row 2 has NaN or infinite weights \(input 5 is"):
        quantize_weight(weight, WeightScheme(8), name="layers.0.mlp")


def test_other_bad_input_is_refused_in_one_line():
    with pytest.raises(QuantError, match="3 bits"):
        WeightScheme(3)
    with pytest.raises(QuantError, match="group size of 0"):
        WeightScheme(4, 0)
    with pytest.raises(QuantError, match="float64"):
        WeightScheme(4, scale_type="float64")
    with pytest.raises(QuantError, match=r"shape \[2, 3, 4\]"):
        quantize_weight(np.ones((2, 3, 4)), WeightScheme(8))
    with pytest.raises(QuantError, match=r"shape \[0, 4\]"):
        quantize_weight(np.ones((0, 4)), WeightScheme(8))
    with pytest.raises(QuantError, match="no quantization algorithm 'magic'; there are: rtn, mse"):
        quantize_weight(np.ones((2, 4)), WeightScheme(8), "magic")
