"""The definitions of the quantized operators against the obvious formula in NumPy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.quantize.functions import call, pack

SHAPES = st.tuples(st.integers(1, 5), st.sampled_from([(32, 16), (96, 32), (64, 64), (80, 16)]), st.integers(0, 2**32))


def drawn(seed, num_outputs, num_inputs, block):
    rng = np.random.default_rng(seed)
    codes = rng.integers(-127, 128, (num_outputs, num_inputs)).astype(np.int8)
    nibbles = rng.integers(0, 16, (num_outputs, num_inputs)).astype(np.uint8)
    scales = rng.uniform(0.001, 2, (num_outputs, num_inputs // block)).astype(np.float32)
    zeros = rng.integers(0, 16, scales.shape).astype(np.uint8)
    x = rng.standard_normal((2, 3, num_inputs)).astype(np.float32)
    return codes, nibbles, scales, zeros, x


@settings(deadline=None, max_examples=25)
@given(SHAPES)
def test_blocked_linears_and_embeddings_dequantize_as_they_say(shape):
    num_outputs, (num_inputs, block), seed = shape
    codes, nibbles, scales, zeros, x = drawn(seed, num_outputs, num_inputs, block)
    wide = np.repeat(scales, block, axis=1)
    ids = np.random.default_rng(seed).integers(0, num_outputs, (2, 4))
    cases = {
        "W8": (codes * wide, {"weight": codes, "scales": scales}),
        "W4": ((nibbles - np.float32(8)) * wide, {"weight": pack(nibbles), "scales": scales}),
        "W4Asymmetric": (
            (nibbles - np.repeat(zeros, block, axis=1).astype(np.float32)) * wide,
            {"weight": pack(nibbles), "scales": scales, "zero_points": pack(zeros)},
        ),
    }
    for suffix, (weight, stored) in cases.items():
        product = call(f"Linear{suffix}", {"x": x, **stored}, block_size=block)
        np.testing.assert_allclose(product, x @ weight.T, atol=1e-4 * np.abs(weight).max() * num_inputs)
        rows = call(f"Embedding{suffix}", {"indices": ids, **stored}, block_size=block)
        np.testing.assert_allclose(rows, weight[ids], rtol=1e-6)


@settings(deadline=None, max_examples=25)
@given(SHAPES, st.sampled_from([1e-20, 1e-3, 1.0, 1e4]))
def test_int8_activations_are_rounded_per_token(shape, magnitude):
    num_outputs, (num_inputs, block), seed = shape
    codes, _, _, _, x = drawn(seed, num_outputs, num_inputs, block)
    x *= np.float32(magnitude)
    x[0, 0] = 0
    scales = np.linspace(0.01, 1, num_outputs, dtype=np.float32)
    step = np.maximum(np.abs(x).max(axis=-1, keepdims=True) / np.float32(127), np.float32(1e-30))
    wanted = np.rint(x / step) @ codes.T.astype(np.float64) * step * scales
    seen = call("LinearW8A8", {"x": x, "weight": np.ascontiguousarray(codes.T), "scales": scales})
    np.testing.assert_allclose(seen, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    assert (seen[0, 0] == 0).all()


def test_static_activations_are_clipped():
    codes = np.arange(-16, 16, dtype=np.int8).reshape(32, 1)
    x = np.linspace(-3, 3, 2 * 32, dtype=np.float32).reshape(2, 32)
    step = np.array(0.01, np.float32)
    scales = np.array([0.5], np.float32)
    wanted = np.clip(np.rint(x / step), -128, 127) @ codes.astype(np.float64) * step * scales
    seen = call("LinearW8A8Static", {"x": x, "weight": codes, "scales": scales, "step": step})
    np.testing.assert_allclose(seen, wanted, rtol=1e-5)
    assert np.abs(x / step).max() > 127


@pytest.mark.parametrize("suffix", ["W8", "W4"])
def test_half_precision_scales_give_half_precision_rows(suffix):
    weight = np.full((3, 32 if suffix == "W8" else 16), 3, np.int8 if suffix == "W8" else np.uint8)
    inputs = {"indices": np.array([[1]]), "weight": weight, "scales": np.ones((3, 2), np.float16)}
    rows = call(f"Embedding{suffix}", inputs, block_size=16)
    assert rows.dtype == np.float16
    assert rows.shape == (1, 1, 32)
