"""Integer products of the calculator are exact where the CPU's kernels for uint8 times int8 saturate."""

import numpy as np
import onnx
import pytest

from qcompile.exact_products import with_exact_products
from qcompile.ort import open_session

# Two of these in a pair leave the range of int16.
CODES = np.full((3, 64), 255, np.uint8)
WEIGHT = np.concatenate([np.full((64, 8), 127, np.int8), np.full((64, 8), -128, np.int8)], axis=1)


def run(text: str, **feeds: np.ndarray) -> np.ndarray:
    header = '<ir_version: 10, opset_import: ["" : 18, "com.microsoft" : 1]>'
    model = onnx.parser.parse_model(f"{header} g {text}").SerializeToString()
    assert with_exact_products(model) != model
    return np.asarray(open_session(model).run(None, {name: np.asarray(x) for name, x in feeds.items()})[0])


@pytest.mark.parametrize("zero_point", [0, 3, 128])
def test_codes_and_weights_as_inputs(zero_point):
    sums = run(
        "(uint8[3, 64] a, int8[64, 16] b, uint8 z) => (int32[3, 16] y) { y = MatMulInteger (a, b, z) }",
        a=CODES,
        b=WEIGHT,
        z=np.uint8(zero_point),
    )
    np.testing.assert_array_equal(sums, (CODES.astype(int) - zero_point) @ WEIGHT.astype(int))


def test_both_zero_points():
    sums = run(
        "(uint8[3, 64] a, int8[64, 16] b, uint8 z, int8 zb) => (int32[3, 16] y) { y = MatMulInteger (a, b, z, zb) }",
        a=CODES,
        b=WEIGHT,
        z=np.uint8(7),
        zb=np.int8(-5),
    )
    np.testing.assert_array_equal(sums, (CODES.astype(int) - 7) @ (WEIGHT.astype(int) + 5))


def test_a_product_that_is_scaled():
    scales, bias = np.linspace(0.5, 2, 16, dtype=np.float32), np.arange(16, dtype=np.float32)
    y = run(
        "(uint8[3, 64] a, int8[64, 16] b, float one, float[16] s, uint8 z, float[16] c) => (float[3, 16] y)"
        " { y = com.microsoft.MatMulIntegerToFloat (a, b, one, s, z, , c) }",
        a=CODES,
        b=WEIGHT,
        one=np.float32(1),
        s=scales,
        z=np.uint8(128),
        c=bias,
    )
    np.testing.assert_allclose(
        y, (CODES.astype(int) - 128) @ WEIGHT.astype(int) * scales.astype(float) + bias, rtol=1e-6
    )


def test_uint8_weights_stay():
    text = "(uint8[3, 64] a, uint8[64, 16] b) => (int32[3, 16] y) { y = MatMulInteger (a, b) }"
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]> g {text}').SerializeToString()
    weight = WEIGHT.view(np.uint8)
    seen = open_session(model).run(None, {"a": CODES, "b": weight})[0]
    np.testing.assert_array_equal(seen, CODES.astype(int) @ weight.astype(int))


def test_a_model_without_integer_products_is_not_touched():
    text = "(float[3, 4] a, float[4, 2] b) => (float[3, 2] y) { y = MatMul (a, b) }"
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]> g {text}').SerializeToString()
    assert with_exact_products(model) is model
