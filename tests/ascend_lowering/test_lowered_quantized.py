"""Quantized graphs on the chip: kernels by scheme, limits, layouts of codes and scales, and the numbers."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.artifact import load_model
from qcompile.ascend.chips import Cann, chip_named
from qcompile.ascend.legality.check import check_model
from qcompile.ascend.lowering import quantized_weights as layout
from qcompile.ascend.lowering.static_graph import dims
from qcompile.errors import UnsupportedOpError
from qcompile.runtime.manifest import Manifest
from qcompile.tensors import StreamedTensor
from qcompile.verify import compare_directories
from tests.ascend_lowering.lowered import AscendOptions, BucketOptions, lower_tiny
from tests.optimized import export_tiny, optimize_tiny

SMALL = BucketOptions((2,), (128,), (16,))
KERNELS = {
    "int8-weight": {"NPUWeightQuantBatchMatmulV2"},
    "int8-dynamic": {"NPUDynamicQuant", "QuantBatchMatMul"},
    "int8-static": {"AscendQuant", "QuantBatchMatMul"},
    "int4": {"NPUWeightQuantBatchMatmulV2"},
    "int8": {"AscendQuant", "QuantBatchMatMul", "NPUWeightQuantBatchMatmulV2"},
}


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    return export_tiny(directory, request.param, hidden_size=128, intermediate_size=320)


def quantized(exported: Path, scheme: str) -> Path:
    output = exported.parent / f"quantized-{scheme}"
    if not output.exists():
        optimize_tiny(exported, output, "fuse", scheme, target="portable", verify="off")
    return output


@pytest.mark.parametrize("scheme", KERNELS)
def test_kernels_numbers_and_legality(exported: Path, scheme: str, tmp_path: Path) -> None:
    source = quantized(exported, scheme)
    report = lower_tiny(source, tmp_path / "out", buckets=SMALL).ascend
    counts = Counter(node.op_type for node in load_model(tmp_path / "out" / "decode_b2_t128.onnx").graph)
    assert KERNELS[scheme] <= counts.keys()
    assert report["graphs"]["decode_b2_t128"]["kernels_per_layer"] <= 28
    for path in (tmp_path / "out").glob("*.onnx"):
        assert check_model(path, chip_named("ascend910b4"), Cann(9, 1)).findings == ()
    agreement = compare_directories(source, tmp_path / "out", num_tokens=12)
    assert agreement.mean_kl < 3e-3  # float16 moves some activations to the next of their 255 codes
    assert agreement.agreement >= 0.8
    if scheme in {"int8-weight", "int4"}:  # no activation is rounded: nothing but float16
        assert agreement.mean_kl < 5e-5


@pytest.mark.parametrize("target", ["ascend310p3", "ascend310b4"])
def test_static_activations_on_the_310(exported: Path, target: str, tmp_path: Path) -> None:
    source = quantized(exported, "int8-static")
    lower_tiny(source, tmp_path / "out", target, SMALL)
    counts = Counter(node.op_type for node in load_model(tmp_path / "out" / "decode_b2_t128.onnx").graph)
    assert counts["AscendQuant"] == counts["AscendDequant"] > 0
    assert counts["QuantBatchMatMul"] == 0
    for path in (tmp_path / "out").glob("*.onnx"):
        assert check_model(path, chip_named(target), Cann(8, 1)).findings == ()
    agreement = compare_directories(source, tmp_path / "out", num_tokens=12)
    assert agreement.mean_kl < 5e-3


def test_a_chip_without_the_scheme_says_which_it_has(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedOpError, match="310P has no kernel for that: quantize with --passes int8, int8-static or"
    ):
        lower_tiny(quantized(exported, "int8-dynamic"), tmp_path / "out", "ascend310p3", SMALL)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("target", "num_float"), [("ascend910b4", 0), ("ascend310p3", 0), ("ascend310b4", 5)])
def test_int8_means_the_same_on_every_chip_and_reads_no_text(
    exported: Path, tmp_path: Path, target: str, num_float: int
) -> None:
    report = optimize_tiny(
        exported, tmp_path / "out", "fuse", "int8", target=target, verify="off", ascend=AscendOptions(buckets=SMALL)
    )
    tensors = Manifest.load(tmp_path / "out").quantization
    assert "calibration" not in tensors
    assert Counter(t["activations"] for t in tensors["tensors"]) == {"norm": 4, "float": 6}
    ops = Counter(n.op_type for n in load_model(tmp_path / "out" / "decode_b2_t128.onnx").graph)
    assert ops["AscendQuant"] == 4
    assert ops["NPUWeightQuantBatchMatmulV2"] == 5 - num_float
    assert any("310B has no kernel for 8-bit weights" in w for w in report.warnings) == bool(num_float)
    for path in (tmp_path / "out").glob("*.onnx"):
        assert check_model(path, chip_named(target), Cann(8, 1)).findings == ()
    assert compare_directories(quantized(exported, "int8"), tmp_path / "out", num_tokens=12).mean_kl < 5e-3


def test_what_a_chip_has_no_kernels_for_is_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOpError, match="int8-dynamic: ascend310p3 has no kernels"):
        optimize_tiny(exported, tmp_path / "other", "fuse", "int8-dynamic", target="ascend310p3")
    with pytest.raises(UnsupportedOpError, match="kv8: the target has no int8 KV cache"):
        optimize_tiny(exported, tmp_path / "other", "fuse", "kv8", target="ascend910b4")


def test_blocks_are_multiples_of_32_on_ascend(exported: Path, tmp_path: Path) -> None:
    """int8-weight has blocks of 16 for some projections elsewhere."""
    report = optimize_tiny(
        exported, tmp_path / "out", "fuse", "int8-weight", target="ascend910b4", ascend=AscendOptions(buckets=SMALL)
    )
    assert not report.warnings
    nodes = [n for n in load_model(tmp_path / "out" / "decode_b2_t128.onnx").graph if "QuantBatchMatmul" in n.op_type]
    assert {n.attributes["antiquant_group_size"].as_int() for n in nodes} == {32}


def test_a_vocabulary_in_pieces(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel takes 65,535 columns; here 200."""
    monkeypatch.setattr("qcompile.ascend.lowering.quantized.MAX_DIM", 200)
    source = quantized(exported, "int8-dynamic")
    lower_tiny(source, tmp_path / "out", buckets=SMALL)
    graph = load_model(tmp_path / "out" / "decode_b2_t128.onnx").graph
    head = [n for n in graph if n.op_type == "NPUWeightQuantBatchMatmulV2" and "lm_head" in (n.name or "")]
    assert [dims(n.outputs[0])[1] for n in head] == [128] * 4
    assert any("transpose_x2" in n.attributes for n in graph if n.op_type == "QuantBatchMatMul")
    assert compare_directories(source, tmp_path / "out", num_tokens=8).mean_kl < 3e-3


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-static", "int4"])
def test_quantized_in_bfloat16(exported: Path, scheme: str, tmp_path: Path) -> None:
    source = quantized(exported, scheme)
    lower_tiny(source, tmp_path / "out", buckets=SMALL, dtype="bf16")
    counts = Counter(n.op_type for n in load_model(tmp_path / "out" / "decode_b2_t128.onnx").graph)
    assert counts["AscendQuant"] == 0  # it takes no bfloat16
    for path in (tmp_path / "out").glob("*.onnx"):
        assert check_model(path, chip_named("ascend910b4"), Cann(8, 1)).findings == ()
    assert compare_directories(source, tmp_path / "out", num_tokens=12).mean_kl < 2e-2


def test_weights_without_a_kernel_become_floats_and_it_is_said(exported: Path, tmp_path: Path) -> None:
    report = lower_tiny(quantized(exported, "int8-weight"), tmp_path / "out", "ascend310b4", SMALL)
    assert any("310B has no kernel for 8-bit weights" in warning for warning in report.warnings)
    assert compare_directories(quantized(exported, "int8-weight"), tmp_path / "out", num_tokens=8).mean_kl < 5e-5


def packed_nibbles(codes: np.ndarray) -> np.ndarray:
    """Pack codes 0 to 15 [N, M] two to a byte, the first one low."""
    return (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)


@given(st.integers(0, 2**32 - 1), st.sampled_from([8, 24]), st.sampled_from([32, 96]))
def test_words_of_eight_codes(seed: int, n: int, m: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 16, (n, m)).astype(np.uint8)
    tensor = layout.nibbles_by_column(ir.Tensor(packed_nibbles(codes)))
    words = tensor.numpy()
    assert words.shape == (m, n // 8)
    assert words.dtype == np.int32
    np.testing.assert_array_equal(layout.codes_of_words(words), codes.T.astype(np.int8) - 8)
    # the first of a word's channels is in its lowest bits
    assert (int(words[3, 0]) & 15) == (int(codes[0, 3]) - 8) % 16


def test_pieces_of_wide_weights() -> None:
    """A vocabulary is cut into ranges of output channels; a streamed source begins its pieces where it must."""
    codes = np.arange(48 * 64).reshape(48, 64).astype(np.uint8) % 16
    packed = packed_nibbles(codes)
    whole = layout.nibbles_by_column(ir.Tensor(packed)).numpy()
    for source in (ir.Tensor(packed), aligned(packed, 20)):
        parts = [layout.nibbles_by_column(source, *bounds).numpy() for bounds in ((0, 16), (16, 40), (40, 48))]
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    signed = codes.astype(np.int8) - 8
    part = layout.codes_by_column(aligned(signed, 20), 24, 48).numpy()
    np.testing.assert_array_equal(part, signed[24:].T)
    scales = np.arange(96, dtype=np.float32).reshape(48, 2)
    seen = layout.scales_by_column(aligned(scales, 20), ir.DataType.FLOAT, (26, 10.0), 24, 48).numpy()
    wanted = scales[24:].T.copy()
    wanted[:, :2] *= 10
    np.testing.assert_array_equal(seen, wanted)


def aligned(array: np.ndarray, multiple: int) -> StreamedTensor:
    """Return a tensor whose rows can be asked for from multiples of a number on only."""

    def rows(start: int, stop: int) -> np.ndarray:
        assert start % multiple == 0
        return array[start:stop]

    shape = ir.Shape(array.shape)
    return StreamedTensor(rows, ir.DataType.from_numpy(array.dtype), shape, row_multiple=multiple)


@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_packed_scales(scale: float) -> None:
    packed = layout.packed_scale(np.array([scale], np.float32))
    assert packed.dtype == np.uint64
    assert int(packed[0]) >> 32 == 1 << 14  # bit 46 and nothing else above the number
    assert int(packed[0]) & 0x1FFF == 0
    assert layout.scale_of_bits(packed)[0] == pytest.approx(scale, rel=2**-9)
    plain = layout.plain_scale(np.array([scale], np.float32))
    assert int(plain[0]) >> 32 == 0
    assert layout.scale_of_bits(plain)[0] == np.float32(scale)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_floats_of_codes(asymmetric: bool) -> None:
    rng = np.random.default_rng(0)
    codes, scales = rng.integers(0, 16, (6, 64)).astype(np.uint8), rng.random((6, 2)).astype(np.float32)
    points = rng.integers(0, 16, (6, 2)).astype(np.uint8)
    zero_points = ir.Tensor(packed_nibbles(points)) if asymmetric else None
    tensor = layout.dequantized(
        ir.Tensor(packed_nibbles(codes)), ir.Tensor(scales), zero_points, ir.DataType.FLOAT, (2, 10.0)
    )
    wanted = codes.astype(np.float32) - (np.repeat(points, 32, axis=1) if asymmetric else 8)
    wanted = wanted * np.repeat(scales, 32, axis=1)
    wanted[:2] *= 10
    np.testing.assert_allclose(tensor.numpy(), wanted, rtol=1e-6)
    if zero_points is not None:
        offsets = layout.offsets_by_column(zero_points, 2, ir.DataType.FLOAT)
        np.testing.assert_array_equal(offsets.numpy(), 8.0 - points.T)
