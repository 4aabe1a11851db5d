"""Every NPU operator's definition against what CANN's documents say, written out in NumPy: arguments, polarity, rounding.

The definitions are what a lowered graph is judged by, so they are judged here by something else.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from qcompile.ascend.lowering import quantized_weights as layout
from qcompile.ascend.lowering.static_graph import StaticGraph
from qcompile.ascend.operators import operator_table
from qcompile.ascend.plugins import PLUGINS
from qcompile.ascend.reference import NPU_OPS, reference_model

RNG = np.random.default_rng(7)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def run(op: str, feeds: dict[str, np.ndarray], constants: dict[str, np.ndarray], shapes: Any, **options: Any) -> Any:
    """Run one operator through its definition; inputs in the order feeds, then constants; None is a hole."""
    graph = StaticGraph("one")
    dtypes = options.pop("dtypes")
    inputs: list[ir.Value | None] = [
        graph.input(name, ir.DataType.from_numpy(array.dtype), array.shape) for name, array in feeds.items()
    ]
    inputs += [None if array is None else graph.constant(name, array) for name, array in constants.items()]
    outputs = graph.ops(op, inputs, shapes, name="y", dtypes=dtypes, **options)
    for index, value in enumerate(outputs):
        graph.output(value, f"out{index}")
    model = ir.to_proto(reference_model(graph.model())).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


FLOAT, INT8, INT32 = ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.INT32


def test_every_definition_is_of_a_registered_operator() -> None:
    table = operator_table(frozenset(PLUGINS))
    assert all(table.get(op) is not None for op in NPU_OPS)


def test_rms_norm_ignores_the_epsilon_it_is_given() -> None:
    x, gamma = 1e-3 * normal(2, 3, 8), normal(8)
    (y,) = run("NPURmsNorm", {"x": x}, {"gamma": gamma}, [(2, 3, 8)], dtypes=[FLOAT], epsilon=0.5)
    wanted = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6) * gamma
    np.testing.assert_allclose(y, wanted, rtol=1e-5)


def test_rotary_turns_halves() -> None:
    x, angle = normal(2, 1, 3, 8), normal(2, 1, 1, 4)
    cos, sin = (np.concatenate([f(angle)] * 2, -1) for f in (np.cos, np.sin))
    (y,) = run("NPURotaryMul", {"x": x, "r1": cos, "r2": sin}, {}, [x.shape], dtypes=[FLOAT])
    pairs = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)
    np.testing.assert_allclose(y, np.concatenate([pairs.real, pairs.imag], -1), atol=1e-6)


def test_dynamic_quantization_has_a_step_per_row() -> None:
    x = normal(3, 16)
    x[1] = 0
    x[2, :3] = [12.7, 0.05, 0.15]  # a step of 0.1: halves go to the even code
    x[2, 3:] = 0
    y, step = run("NPUDynamicQuant", {"x": x}, {}, [(3, 16), (3,)], dtypes=[INT8, FLOAT])
    np.testing.assert_allclose(step[[0, 2]], np.abs(x[[0, 2]]).max(1) / 127, rtol=1e-6)
    np.testing.assert_allclose(y[[0, 2]] * step[[0, 2], None], x[[0, 2]], atol=float(step.max()) * 0.501)
    assert not y[1].any()
    assert y[2, 0] == 127


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_static_quantization_multiplies_rounds_and_cuts(offset: float) -> None:
    x = np.array([[0.5, 1.5, 2.5, -0.5, 100.0, -100.0, 0.26, 63.4]], np.float32)
    (y,) = run("AscendQuant", {"x": x}, {}, [x.shape], dtypes=[INT8], scale=2.0, offset=offset)
    np.testing.assert_array_equal(y[0], np.clip(np.rint(x[0] * 2) + offset, -128, 127).astype(np.int8))
    (y,) = run("AscendQuant", {"x": x}, {}, [x.shape], dtypes=[INT8], scale=1.0, offset=0.0)
    np.testing.assert_array_equal(y[0, :4], [0, 2, 2, 0])


def test_static_quantization_with_a_scale_as_input() -> None:
    x, scale = 10 * normal(2, 8), np.array([3.0], np.float32)
    (y,) = run("NPUAscendQuantV2", {"x": x}, {"scale": scale}, [x.shape], dtypes=[INT8], axis=-1)
    np.testing.assert_array_equal(y, np.clip(np.rint(x * 3), -128, 127).astype(np.int8))
    shift = np.array([0.4], np.float32)
    (y,) = run("NPUAscendQuantV2", {"x": x}, {"scale": scale, "offset": shift}, [x.shape], dtypes=[INT8], axis=-1)
    np.testing.assert_array_equal(y, np.clip(np.rint(x * 3 + np.float32(0.4)), -128, 127).astype(np.int8))


def test_dequantization_reads_plain_float_bits() -> None:
    sums, scale = RNG.integers(-1000, 1000, (2, 4)).astype(np.int32), np.array([0.5, 0.25, 3e-5, 2.0], np.float32)
    constants = {"deq_scale": layout.plain_scale(scale)}
    (y,) = run("AscendDequant", {"x": sums}, constants, [(2, 4)], dtypes=[FLOAT], dtype=1)
    np.testing.assert_allclose(y, sums * scale, rtol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_quantized_product(transposed: bool, per_token: bool) -> None:
    """Inputs: x1, x2, scale, offset, bias, pertoken_scale; holes stay holes."""
    x = RNG.integers(-127, 128, (3, 32)).astype(np.int8)
    w = RNG.integers(-127, 128, (32, 8)).astype(np.int8)
    scale, bias, step = np.abs(normal(8)) + 0.1, normal(8), np.abs(normal(3)) + 0.1
    constants: dict[str, Any] = {"x2": np.ascontiguousarray(w.T) if transposed else w}
    if per_token:
        constants |= {"scale": scale, "offset": None, "bias": bias, "step": step}
    else:
        constants |= {"scale": layout.packed_scale(scale)}
    options = {"transpose_x2": 1} if transposed else {}
    (y,) = run("QuantBatchMatMul", {"x1": x}, constants, [(3, 8)], dtypes=[FLOAT], dtype=1, **options)
    sums = x.astype(np.int64) @ w.astype(np.int64)
    if per_token:
        np.testing.assert_allclose(y, sums * scale * step[:, None] + bias, rtol=1e-5, atol=1e-4)
    else:
        kept = layout.scale_of_bits(layout.packed_scale(scale))
        np.testing.assert_allclose(y, sums * kept, rtol=1e-6)
        np.testing.assert_allclose(kept, scale, rtol=2**-10)


@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize("four_bits", [False, True])
def test_weight_only_product_adds_the_offset_then_scales(with_offset: bool, four_bits: bool) -> None:
    x, scale, offset = normal(3, 64), np.abs(normal(2, 16)), RNG.integers(-8, 8, (2, 16)).astype(np.float32)
    low, high = (-8, 8) if four_bits else (-128, 128)
    codes = RNG.integers(low, high, (64, 16)).astype(np.int8)
    stored: np.ndarray = codes
    if four_bits:
        nibbles = (codes.T + 8).astype(np.uint8)
        stored = layout.nibbles_by_column(ir.Tensor(nibbles[:, ::2] | nibbles[:, 1::2] << 4)).numpy()
    constants = {"weight": stored, "scale": scale} | ({"offset": offset} if with_offset else {})
    options = {"antiquant_group_size": 32}
    (y,) = run("NPUWeightQuantBatchMatmulV2", {"x": x}, constants, [(3, 16)], dtypes=[FLOAT], **options)
    moved = codes + (np.repeat(offset, 32, 0) if with_offset else 0)
    np.testing.assert_allclose(y, x @ (moved * np.repeat(scale, 32, 0)), rtol=1e-4, atol=1e-3)


def test_flash_attention_does_not_look_where_the_mask_is_one() -> None:
    """Four query heads on two of keys; query [B,H,S,d], output [B,S,H,d]."""
    q, k, v = normal(2, 4, 3, 8), normal(2, 2, 6, 8), normal(2, 2, 6, 8)
    pse = normal(1, 4, 3, 6)
    mask = (RNG.random((2, 1, 3, 6)) < 0.4).astype(np.int8)
    mask[..., 0] = 0
    feeds = {"q": q, "k": k, "v": v, "pse": pse, "mask": mask}
    attributes = {"num_heads": 4, "num_key_value_heads": 2, "scale_value": 0.5, "input_layout": "BNSD_BSND"}
    (y,) = run("NPUPromptFlashAttention", feeds, {}, [(2, 3, 4, 8)], dtypes=[FLOAT], **attributes)
    keys, values = (np.repeat(a.astype(np.float64), 2, axis=1) for a in (k, v))
    scores = np.where(mask == 1, -np.inf, q @ keys.transpose(0, 1, 3, 2) * 0.5 + pse)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    wanted = (weights / weights.sum(-1, keepdims=True)) @ values
    np.testing.assert_allclose(y, wanted.transpose(0, 2, 1, 3), atol=1e-5)
