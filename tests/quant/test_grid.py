"""Grids that are found in dequantized weights: the formats of ggml, against its own arithmetic, and what lies on none."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.quant.grid import Kind, fit_blocks, in_half
from qcompile.quant.grid_nested import NESTED
from qcompile.quant.grid_rows import KINDS, Storage, rows_on_grid
from tests.quant.ggml_weights import dequantized

SYMMETRIC, NESTED_16, AFFINE, AFFINE_16 = KINDS


def rebuilt(found, kind, bits):
    """The obvious formula, from what is stored."""

    def numbers(part):
        if part.storage.max() == Storage.CODES:
            return part.codes * np.repeat(part.steps, NESTED // kind.block, axis=1)
        half = part.storage.max() == Storage.HALF
        return part.values.astype(np.float16).astype(np.float32) if half else part.values

    scales = numbers(found.scales)
    offsets = 0 if found.minima is None else (1 << (bits - 1)) * scales - numbers(found.minima)
    spread = [np.repeat(a, kind.block, axis=1) if np.ndim(a) else a for a in (scales, offsets)]
    return found.codes * spread[0] + spread[1]


@pytest.mark.parametrize(
    ("name", "kind", "bits", "scales"),
    [
        ("Q4_0", SYMMETRIC, 4, Storage.HALF),
        ("Q5_0", SYMMETRIC, 5, Storage.HALF),
        ("Q8_0", SYMMETRIC, 8, Storage.HALF),
        ("Q4_1", AFFINE, 4, Storage.HALF),
        ("Q5_1", AFFINE, 5, Storage.HALF),
        ("Q3_K", NESTED_16, 4, Storage.CODES),
        ("Q6_K", NESTED_16, 6, Storage.CODES),
        ("Q2_K", AFFINE_16, 4, Storage.CODES),
        ("Q4_K", AFFINE, 4, Storage.CODES),
        ("Q5_K", AFFINE, 5, Storage.CODES),
    ],
)
def test_each_format_of_ggml_is_found_and_gives_its_weights_back(name, kind, bits, scales):
    weights = dequantized(Type[name])
    found = rows_on_grid(weights, kind)
    assert set(found.bits) == {bits}
    assert found.scales.storage.max() == scales
    if found.minima is not None:
        assert found.minima.storage.max() == scales
    again = rows_on_grid(weights, kind, bits)
    np.testing.assert_array_equal(again.codes, found.codes)
    # products of small integers and half-precision steps are exact; a sum of two of them is rounded once
    tolerance = 2.0**-22 * np.abs(weights).max() if kind.is_affine else 0
    np.testing.assert_allclose(rebuilt(found, kind, bits), weights, rtol=2.0**-23, atol=tolerance)


def slow_step(values):
    """The largest step of which all values are multiples, tried one by one."""
    size = np.abs(values).max()
    for n in range(1, 129):
        step = np.float64(size) / n
        if (np.abs(values / step - np.rint(values / step)) < 1e-4).all():
            return step
    return None


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 128), st.floats(1e-4, 10), st.integers(0, 2**32))
def test_steps_are_those_of_a_slow_search(largest, step, seed):
    rng = np.random.default_rng(seed)
    codes = rng.integers(-largest, largest, (4, 16))
    values = (codes * np.float32(step)).astype(np.float32)
    found = fit_blocks(values, Kind(16, is_nested=True))
    assert found.fits.all()
    np.testing.assert_allclose(found.codes * found.steps[:, None], values, rtol=2.0**-20)
    for block, seen in zip(values, found.steps, strict=True):
        if np.abs(block).max() > 0:
            assert abs(seen) == pytest.approx(slow_step(block), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_nobody_rounded_are_on_no_grid(kind):
    weights = np.random.default_rng(1).standard_normal((64, 256)).astype(np.float32)
    assert not rows_on_grid(weights, kind).bits.any()


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_are_on_every_grid(kind):
    weights = np.zeros((20, 256), np.float32)
    found = rows_on_grid(weights, kind)
    assert set(found.bits) == {4}
    np.testing.assert_array_equal(rebuilt(found, kind, 4), weights)


def test_one_weight_off_its_grid_takes_its_row_with_it():
    weights = dequantized(Type.Q5_0)
    weights[7, 40] *= np.float32(1.01)
    bits = rows_on_grid(weights, SYMMETRIC).bits
    assert bits[7] == 0
    assert set(np.delete(bits, 7)) == {5}


def test_half_precision_does_not_hold_products_of_codes_and_steps():
    """Rows of Q4_K beside rows of Q4_1: what holds the scales of both is float32."""
    nested, plain = (rows_on_grid(dequantized(name), AFFINE).scales for name in (Type.Q4_K, Type.Q4_1))
    assert (nested.storage.max(), plain.storage.max()) == (Storage.CODES, Storage.HALF)
    assert not np.isfinite(in_half(nested.values)).all()
    assert Storage.of_all((Storage.CODES, Storage.HALF)) == Storage.SINGLE
    assert Storage.of_all(plain.storage) == Storage.HALF


def test_weights_of_a_grid_in_bfloat16_are_on_none():
    weights = dequantized(Type.Q5_0).view(np.uint32)
    rounded = ((weights + np.uint32(0x8000)) & np.uint32(0xFFFF0000)).view(np.float32)
    assert not rows_on_grid(rounded, SYMMETRIC).bits.all()


def test_numbers_near_a_half_precision_number_are_told_from_others():
    numbers = np.array([0.1, np.float32(np.float16(0.1)), 1e6, 0.0], np.float32)
    np.testing.assert_array_equal(np.isfinite(in_half(numbers)), [False, True, False, True])
