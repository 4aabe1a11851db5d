import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qcompile.errors import QuantError
from qcompile.quant.rtn import block_scales, dequantize_blocks, quantize_blocks

WEIGHTS = arrays(np.float32, (4, 64), elements=st.floats(-1e4, 1e4, width=32))


@given(WEIGHTS, st.sampled_from([8, 16, 32, 64]))
def test_error_is_at_most_half_a_step(weight, block_size):
    scales = block_scales(weight, block_size)
    restored = dequantize_blocks(quantize_blocks(weight, scales), scales)
    step = np.repeat(scales, block_size, axis=1).astype(np.float64)
    assert (np.abs(weight.astype(np.float64) - restored) <= step * (0.5 + 1e-5)).all()


@given(WEIGHTS)
def test_quantizing_twice_changes_nothing(weight):
    scales = block_scales(weight, 16)
    quantized = quantize_blocks(weight, scales)
    again = quantize_blocks(dequantize_blocks(quantized, scales), scales)
    assert np.array_equal(quantized, again)


def test_agrees_with_an_obvious_loop():
    weight = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    scales = block_scales(weight, 8)
    quantized = quantize_blocks(weight, scales)
    for row in range(3):
        for block in range(4):
            values = weight[row, block * 8 : block * 8 + 8]
            scale = max(abs(float(v)) for v in values) / 127
            assert scales[row, block] == pytest.approx(scale, rel=1e-6)
            for i, value in enumerate(values):
                assert quantized[row, block * 8 + i] == round(float(value) / float(scales[row, block]))


def test_a_block_of_zeros_stays_zero():
    weight = np.zeros((2, 32), np.float32)
    weight[1, 16:] = 1.0
    scales = block_scales(weight, 16)
    assert np.isfinite(scales).all()
    assert np.array_equal(dequantize_blocks(quantize_blocks(weight, scales), scales), weight)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_with_their_row(bad):
    weight = np.ones((3, 16), np.float32)
    weight[2, 5] = bad
    with pytest.raises(QuantError, match="row 2 has NaN or infinite"):
        block_scales(weight, 16)


def test_a_block_that_does_not_divide_is_refused():
    with pytest.raises(QuantError, match="no blocks of 24"):
        block_scales(np.ones((2, 32), np.float32), 24)
