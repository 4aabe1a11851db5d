"""Every fused operator against a definition of its own, in float64, on two evaluators."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from qcompile.functions import DOMAIN, FUSED_OPS
from qcompile.ort import open_session

Arrays = Sequence[np.ndarray]
LIMITS = {np.float32: 2e-5, np.float16: 4e-3}
FEW = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
FLOATS = st.sampled_from([np.float32, np.float16])
SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.integers(1, 5)


def evaluate(name: str, inputs: Arrays, attributes: dict[str, Any] | None = None) -> dict[str, Arrays]:
    """Call one fused operator on ONNX Runtime and on onnx's reference evaluator."""
    op = FUSED_OPS[name]
    values = [
        ir.Value(
            name=f"i{index}",
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            shape=ir.Shape([None] * array.ndim),
        )
        for index, array in enumerate(inputs)
    ]
    node = ir.node(name, values, attributes or {}, domain=DOMAIN, num_outputs=op.num_outputs)
    for index, value in enumerate(node.outputs):
        value.name = f"o{index}"
    graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": 18, DOMAIN: 1}, name="one")
    proto = ir.to_proto(ir.Model(graph, ir_version=10, functions=[op.function]))
    feeds = {value.name: array for value, array in zip(values, inputs, strict=True)}
    # The reference evaluator overflows inside a float16 Sigmoid, which is 0 all the same.
    with np.errstate(all="ignore"):
        reference = ReferenceEvaluator(proto).run(None, feeds)
    return {"onnxruntime": open_session(proto.SerializeToString()).run(None, feeds), "onnx.reference": reference}


def check(
    name: str,
    inputs: Arrays,
    wanted: Arrays,
    attributes: dict[str, Any] | None = None,
    limit: float = 0,
    floor: float = 1e-30,
) -> None:
    """Compare both evaluators with the definition, relative to its largest number; the first float decides the limit."""
    dtype = next(array.dtype for array in inputs if array.dtype.kind == "f")
    allowed = limit or LIMITS[dtype.type]
    for evaluator, seen in evaluate(name, inputs, attributes).items():
        for a, b in zip(wanted, seen, strict=True):
            assert b.dtype == dtype, (evaluator, b.dtype)
            assert a.shape == b.shape, evaluator
            scale = max(float(np.abs(a).max(initial=0)), floor)
            assert np.abs(a - b.astype(np.float64)).max(initial=0) <= allowed * scale, evaluator


def normal(seed: int, dtype: type, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) * scale).astype(dtype)


def wide(*arrays: np.ndarray) -> list[np.ndarray]:
    return [array.astype(np.float64) for array in arrays]


def rms(x: np.ndarray, gamma: np.ndarray, epsilon: float) -> np.ndarray:
    """Zhang & Sennrich 2019, eq. 4, with epsilon under the root."""
    return x / np.sqrt((x**2).sum(-1, keepdims=True) / x.shape[-1] + epsilon) * gamma


def layer(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, epsilon: float) -> np.ndarray:
    """Ba et al. 2016, eq. 4; the variance is that of the population."""
    mean = x.sum(-1, keepdims=True) / x.shape[-1]
    variance = ((x - mean) ** 2).sum(-1, keepdims=True) / x.shape[-1]
    return (x - mean) / np.sqrt(variance + epsilon) * gamma + beta


@FEW
@given(
    SEEDS, FLOATS, SIZES, SIZES, st.integers(1, 33), st.sampled_from([1e-6, 1e-5, 0.1]), st.sampled_from([1e-3, 1.0])
)
def test_norms(seed, dtype, batch, length, hidden, epsilon, scale):
    x, residual = (normal(seed + i, dtype, batch, length, hidden, scale=scale) for i in range(2))
    gamma, beta = normal(seed + 2, dtype, hidden), normal(seed + 3, dtype, hidden)
    x64, gamma64, beta64 = wide(x, gamma, beta)
    h = x + residual
    attributes = {"epsilon": epsilon}
    # A row of one element has no spread: what remains is rounding divided by sqrt(epsilon).
    limit = 0.1 if hidden < 3 and dtype is np.float16 else 0
    check("RmsNorm", [x, gamma], [rms(x64, gamma64, epsilon)], attributes)
    check("AddRmsNorm", [x, residual, gamma], [rms(*wide(h, gamma), epsilon), *wide(h)], attributes)
    check("LayerNorm", [x, gamma, beta], [layer(x64, gamma64, beta64, epsilon)], attributes, limit)
    check(
        "AddLayerNorm", [x, residual, gamma, beta], [layer(*wide(h, gamma, beta), epsilon), *wide(h)], attributes, limit
    )


def test_norms_of_large_half_numbers_do_not_overflow():
    x, gamma = np.full((1, 2, 64), 6e4, np.float16), np.ones(64, np.float16)
    x[0, 1, ::2] *= -1
    check("RmsNorm", [x, gamma], [rms(*wide(x, gamma), 1e-6)], {"epsilon": 1e-6})
    check("LayerNorm", [x[:, 1:], gamma, gamma], [layer(*wide(x[:, 1:], gamma, gamma), 1e-6)], {"epsilon": 1e-6})


@FEW
@given(SEEDS, FLOATS, SIZES, SIZES, st.integers(1, 33), st.integers(1, 33))
def test_linear(seed, dtype, batch, length, inputs, outputs):
    x, w, b = (
        normal(seed, dtype, batch, length, inputs),
        normal(seed, dtype, inputs, outputs),
        normal(seed, dtype, outputs),
    )
    x64, w64, b64 = wide(x, w, b)
    check("Linear", [x, w, b], [np.einsum("bsm,mn->bsn", x64, w64) + b64])
    check("Linear", [x[0], w, b], [x64[0] @ w64 + b64])


@FEW
@given(SEEDS, FLOATS, st.lists(SIZES, min_size=1, max_size=4), st.sampled_from([0.1, 1.0, 8.0]))
def test_activations(seed, dtype, shape, scale):
    x, up = normal(seed, dtype, *shape, scale=scale), normal(seed + 1, dtype, *shape)
    x64, up64 = wide(x, up)
    # Where 1 + tanh cancels, or a sigmoid is next to nothing, an error in the last bit of 1 is multiplied by x.
    floor = float(np.abs(x64).max())
    erf = np.vectorize(math.erf, otypes=[np.float64])
    check("SwiGlu", [x, up], [x64 / (1 + np.exp(-x64)) * up64], floor=float(np.abs(x64 * up64).max()))
    check("Gelu", [x], [x64 / 2 * (1 + erf(x64 / np.sqrt(2)))], floor=floor)
    check("GeluTanh", [x], [x64 / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x64 + 0.044715 * x64**3)))], floor=floor)


def rotate(x: np.ndarray, positions: np.ndarray, base: float = 1e4) -> np.ndarray:
    """Su et al. 2021, eq. 15: pair (i, i + d/2) turns as a complex number by position * base^(-2i/d). x [B, N, S, d]."""
    half = x.shape[-1] // 2
    angle = positions[:, None, :, None] * base ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def angles(positions: np.ndarray, head: int, base: float = 1e4) -> tuple[np.ndarray, np.ndarray]:
    angle = positions[:, None, :, None] * base ** (-np.tile(np.arange(head // 2), 2) / (head // 2))
    return np.cos(angle), np.sin(angle)


@FEW
@given(SEEDS, FLOATS, SIZES, SIZES, SIZES, st.integers(1, 9))
def test_rotary_embedding(seed, dtype, batch, heads, length, half):
    positions = np.random.default_rng(seed).integers(0, 50, (batch, length))
    x = normal(seed, dtype, batch, heads, length, 2 * half)
    cos, sin = (a.astype(dtype) for a in angles(positions, 2 * half))
    check("RotaryEmbedding", [x, cos, sin], [rotate(*wide(x), positions)])
    shared = [a[:1].astype(dtype) for a in angles(positions, 2 * half)]
    check("RotaryEmbedding", [x, *shared], [rotate(*wide(x), np.repeat(positions[:1], batch, 0))])


def attend(q, k, v, past_key, past_value, positions, mask, scale) -> Arrays:
    """Vaswani et al. 2017, eq. 1, query by query; query head h reads key head h // (H / K), Ainslie et al. 2023."""
    (batch, length, heads, head), kv_heads, past = q.shape, k.shape[2], past_key.shape[2]
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    keys = np.concatenate([past_key, rotate(k, positions)], axis=2)
    values, q = np.concatenate([past_value, v], axis=2), rotate(q, positions)
    y = np.zeros((batch, length, heads, head))
    for b, i, h in np.ndindex(batch, length, heads):
        seen = [j for j in range(past + i + 1) if mask[b, j]]
        group = h // (heads // kv_heads)
        scores = np.array([q[b, h, i] @ keys[b, group, j] * scale for j in seen])
        weights = np.exp(scores - scores.max())
        y[b, i, h] = weights @ values[b, group, seen] / weights.sum()
    return y.reshape(batch, length, -1), keys, values


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    SEEDS,
    FLOATS,
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 5),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 4),
)
def test_attention(seed, dtype, batch, length, past, kv_heads, group, half):
    rng, heads, head = np.random.default_rng(seed), kv_heads * group, 2 * half
    q = normal(seed, dtype, batch, length, heads, head)
    k, v = (normal(seed + i, dtype, batch, length, kv_heads, head) for i in (1, 2))
    past_key, past_value = (normal(seed + i, dtype, batch, kv_heads, past, head) for i in (3, 4))
    # Rows of different lengths, padded on the left or with holes; a query always sees itself.
    mask = rng.integers(0, 2, (batch, past + length))
    mask[:, past:] = 1
    positions = np.maximum(mask.cumsum(1) - 1, 0)[:, past:]
    scale = float(rng.choice([0.125, head**-0.5, 1.0]))
    inputs = [
        q.reshape(batch, length, -1),
        k.reshape(batch, length, -1),
        v.reshape(batch, length, -1),
        past_key,
        past_value,
    ]
    inputs += [*(a.astype(dtype) for a in angles(positions, head)), mask]
    wanted = attend(*wide(q, k, v, past_key, past_value), positions, mask, scale)
    attributes = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": scale}
    check("Attention", inputs, wanted, attributes, LIMITS[dtype] * 3)


def test_a_query_that_may_see_nothing_is_finite():
    q = normal(0, np.float32, 1, 2, 4)
    cache, ones = np.zeros((1, 1, 0, 4), np.float32), np.ones((1, 1, 2, 4), np.float32)
    mask = np.array([[0, 1]])
    attributes = {"num_heads": 1, "kv_num_heads": 1, "scale": 0.5}
    for seen in evaluate("Attention", [q, q, q, cache, cache, ones, 0 * ones, mask], attributes).values():
        assert np.isfinite(seen[0]).all()
        np.testing.assert_allclose(seen[0][0, 1], q[0, 1], rtol=1e-6)


def test_large_keys_do_not_overflow_in_half():
    """Qwen's key biases reach hundreds: q k^T before the scale would be infinite in float16."""
    q = np.full((1, 1, 64), 200, np.float16)
    cache, ones = np.zeros((1, 1, 0, 64), np.float16), np.ones((1, 1, 1, 64), np.float16)
    attributes = {"num_heads": 1, "kv_num_heads": 1, "scale": 0.125 / 8}
    inputs = [q, q, q / 100, cache, cache, ones, 0 * ones, np.ones((1, 1), np.int64)]
    for seen in evaluate("Attention", inputs, attributes).values():
        np.testing.assert_array_equal(seen[0], q / 100)


def unpack(packed: np.ndarray, width: int) -> np.ndarray:
    """Two codes in a byte, the first in the low half."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)[..., :width]


def by_group(numbers: np.ndarray, block: int, width: int) -> np.ndarray:
    return np.repeat(numbers, block, axis=-1)[..., :width]


@FEW
@given(SEEDS, FLOATS, SIZES, st.integers(1, 4), st.integers(1, 3), st.sampled_from([16, 32]))
def test_weights_in_blocks(seed, dtype, rows, outputs, groups, block):
    rng, width = np.random.default_rng(seed), groups * block
    x, indices = normal(seed, dtype, rows, width), rng.integers(0, outputs, (rows, 2))
    int8 = rng.integers(-127, 128, (outputs, width)).astype(np.int8)
    int4 = rng.integers(0, 256, (outputs, width // 2)).astype(np.uint8)
    zeros = rng.integers(0, 256, (outputs, -(-groups // 2))).astype(np.uint8)
    scales = (rng.random((outputs, groups)) / 10 + 0.01).astype(dtype)
    factors = by_group(*wide(scales), block, width)
    zero_points = by_group(unpack(zeros, groups).astype(np.float64), block, width)
    codes = unpack(int4, width).astype(np.float64)
    attributes = {"block_size": block}
    cases: list[tuple[str, list[np.ndarray], np.ndarray]] = [
        ("W8", [int8, scales], int8 * factors),
        ("W4", [int4, scales], (codes - 8) * factors),
        ("W4Asymmetric", [int4, scales, zeros], (codes - zero_points) * factors),
    ]
    for suffix, stored, weight in cases:
        # Half precision rounds each dequantized weight.
        check(f"Linear{suffix}", [x, *stored], [x.astype(np.float64) @ weight.T], attributes, LIMITS[dtype] * 4)
        check(f"Embedding{suffix}", [indices, *stored], [weight[indices]], attributes)


@FEW
@given(SEEDS, FLOATS, SIZES, st.integers(1, 40), st.integers(1, 9), st.booleans())
def test_int8_products(seed, dtype, rows, inputs, outputs, static):
    rng = np.random.default_rng(seed)
    x, weight = normal(seed, dtype, 2, rows, inputs), rng.integers(-127, 128, (inputs, outputs)).astype(np.int8)
    scales = (rng.random(outputs) / 10 + 0.01).astype(dtype)
    x32 = x.astype(np.float32)
    step = np.float32(2**-5) if static else np.abs(x32).max(-1, keepdims=True) / np.float32(127)
    codes = np.clip(np.round(x32 / step), -127, 127).astype(np.float64)
    wanted = codes * step @ weight.astype(np.float64) * scales.astype(np.float64)
    extra = [np.array(step, dtype)] if static else []
    check(
        "LinearW8A8Static" if static else "LinearW8A8", [x, weight, scales, *extra], [wanted], limit=LIMITS[dtype] * 2
    )


def test_a_row_of_zeros_has_a_step():
    x, weight, scales = np.zeros((1, 2, 3), np.float32), np.ones((3, 2), np.int8), np.ones(2, np.float32)
    check("LinearW8A8", [x, weight, scales], [np.zeros((1, 2, 2))])


def equal(name: str, inputs: Arrays, wanted: np.ndarray, **attributes: int) -> None:
    for evaluator, seen in evaluate(name, inputs, attributes).items():
        np.testing.assert_array_equal(seen[0], wanted, evaluator, strict=True)


@FEW
@given(SEEDS, SIZES, st.integers(1, 4), st.sampled_from([4, 5, 6]))
def test_unpacked_codes(seed, rows, eighths, bits):
    rng, half = np.random.default_rng(seed), 4 * eighths
    nibbles = rng.integers(0, 256, (rows, half)).astype(np.uint8)
    low = np.concatenate([nibbles & 15, nibbles >> 4], axis=1).astype(np.int64)
    if bits == 4:
        equal("UnpackInt4", [nibbles], (low - 8).astype(np.int8))
        return
    rest = rng.integers(0, 256, (rows, 2 * half * (bits - 4) // 8)).astype(np.uint8)
    flat = np.unpackbits(rest, axis=1, bitorder="little").reshape(rows, 2 * half, bits - 4)
    high = (flat * 2 ** np.arange(bits - 4)).sum(-1)
    equal(f"UnpackInt{bits}", [nibbles, rest], (low + 16 * high - 2 ** (bits - 1)).astype(np.int8))


@FEW
@given(SEEDS, SIZES, SIZES, st.integers(1, 4))
def test_scales_of_blocks(seed, rows, steps, times):
    rng = np.random.default_rng(seed)
    codes, by_step = (
        rng.integers(-128, 128, (rows, steps * times)).astype(np.int8),
        normal(seed, np.float32, rows, steps),
    )
    scales = codes.astype(np.float32) * np.repeat(by_step, times, axis=1)
    equal("BlockScales", [codes, by_step], scales)
    equal("RepeatScales", [scales], np.repeat(scales, times, axis=1), times=times)


@FEW
@given(SEEDS, SIZES, SIZES, st.sampled_from([7, 15, 31]))
def test_zero_points(seed, rows, blocks, largest):
    rng = np.random.default_rng(seed)
    scales = (rng.random((rows, blocks)) * 0.1 + 0.001).astype(np.float32)
    scales[:, :1] = 0  # a block of one value
    minima = (rng.uniform(-2, largest + 2, (rows, blocks)) * 0.05).astype(np.float32)
    z = np.clip(np.round(minima / np.where(scales == 0, np.float32(1), scales)), 0, largest)
    equal("ZeroPoints", [scales, minima], z, largest=largest)
    middle = (largest + 1) // 2
    codes = rng.integers(-middle, middle, (rows, 16 * blocks)).astype(np.int8)
    shifted = codes + middle - np.repeat(z, 16, axis=1).astype(np.int64)
    equal("ShiftCodes", [codes, z], shifted.astype(np.int8), middle=middle)
    few = np.minimum(z, 15)
    even = np.pad(few, ((0, 0), (0, blocks % 2))).astype(np.uint8)
    equal("PackInt4", [few], even[:, ::2] + 16 * even[:, 1::2])


TESTED: dict[str, Callable[..., None]] = {
    **dict.fromkeys(("RmsNorm", "AddRmsNorm", "LayerNorm", "AddLayerNorm"), test_norms),
    **dict.fromkeys(("SwiGlu", "Gelu", "GeluTanh"), test_activations),
    **dict.fromkeys(
        (f"{op}{w}" for op in ("Linear", "Embedding") for w in ("W8", "W4", "W4Asymmetric")), test_weights_in_blocks
    ),
    **dict.fromkeys(("LinearW8A8", "LinearW8A8Static"), test_int8_products),
    **dict.fromkeys(("UnpackInt4", "UnpackInt5", "UnpackInt6"), test_unpacked_codes),
    **dict.fromkeys(("BlockScales", "RepeatScales"), test_scales_of_blocks),
    **dict.fromkeys(("ZeroPoints", "ShiftCodes", "PackInt4"), test_zero_points),
    "Linear": test_linear,
    "RotaryEmbedding": test_rotary_embedding,
    "Attention": test_attention,
}


@pytest.mark.parametrize("name", sorted(FUSED_OPS))
def test_every_function_has_a_test(name):
    assert name in TESTED
