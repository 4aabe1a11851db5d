"""What the static graphs look like: shapes, types, operators, weights, kernels."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from qcompile.artifact import load_model
from qcompile.ascend.chips import Cann, chip_named
from qcompile.ascend.legality.check import check_model
from qcompile.ascend.lowering.static_graph import dims
from qcompile.errors import GraphError, PassError, ShapeError, UnsupportedOpError
from qcompile.runtime.manifest import Manifest
from tests.ascend_lowering.lowered import BUCKETS, BucketOptions, fuse_tiny, lower_tiny
from tests.optimized import export_tiny, optimize_tiny


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fuse_tiny(tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="module")
def lowered(fused: Path) -> Path:
    output = fused.parent / "lowered"
    lower_tiny(fused, output)
    return output


def graphs(directory: Path) -> dict[str, onnx.ModelProto]:
    return {path.stem: onnx.load(path, load_external_data=False) for path in sorted(directory.glob("*.onnx"))}


def test_one_graph_per_bucket(lowered: Path) -> None:
    wanted = {
        "decode_b1_t64",
        "decode_b4_t64",
        "decode_b1_t128",
        "decode_b4_t128",
        "prefill_s16_t64",
        "prefill_s16_t128",
    }
    assert set(graphs(lowered)) == wanted
    manifest = Manifest.load(lowered)
    assert {entry.bucket for entry in manifest.graphs} == {
        *((b, 1, t) for b in (1, 4) for t in (64, 128)),
        *((1, 16, t) for t in (64, 128)),
    }
    assert {entry.role for entry in manifest.graphs} == {"prefill", "decode"}
    assert manifest.target == "ascend910b4"


@pytest.mark.parametrize(
    "target", ["ascend910b4", "ascend910b1", "ascend910b2", "ascend910b3", "ascend310p3", "ascend310b4"]
)
@pytest.mark.parametrize("cann", [Cann(8, 1), Cann(9, 1)])
def test_atc_would_take_every_graph(fused: Path, tmp_path: Path, target: str, cann: Cann) -> None:
    lower_tiny(fused, tmp_path / "out", target, BucketOptions((2,), (64,), (16,)))
    for path in (tmp_path / "out").glob("*.onnx"):
        assert check_model(path, chip_named(target), cann).findings == ()


def test_the_form_the_parser_wants(lowered: Path) -> None:
    for name, model in graphs(lowered).items():
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 16)], name
        assert not model.functions
        known = {v.name: v for v in (*model.graph.input, *model.graph.value_info, *model.graph.output)}
        for node in model.graph.node:
            assert node.domain == ""
            for output in node.output:
                tensor = known[output].type.tensor_type
                assert tensor.elem_type
                assert all(dim.dim_value > 0 for dim in tensor.shape.dim), (name, output)


def test_only_ids_are_int64(lowered: Path) -> None:
    """No int64 is computed with: it comes in as ids and goes out as choices."""
    for path in lowered.glob("*.onnx"):
        for node in load_model(path).graph:
            made = {value.dtype.name for value in node.outputs if value.dtype is not None}
            assert "BOOL" not in made
            assert "INT64" not in made or node.op_type in {"ArgMax", "TopK"}, node


def test_interface(lowered: Path) -> None:
    model = load_model(lowered / "decode_b4_t64.onnx")
    inputs = {v.name: (v.dtype.name, dims(v)) for v in model.graph.inputs if v.dtype is not None}
    assert inputs["input_ids"] == ("INT64", (4, 1))
    assert inputs["past_lengths"] == ("INT32", (4,))
    assert inputs["past_key_values.1.value"] == ("FLOAT16", (4, 2, 64, 16))
    outputs = {v.name: dims(v) for v in model.graph.outputs}
    assert outputs["next_token"] == (4, 1)
    assert outputs["top_logits"] == outputs["top_ids"] == (4, 1, 64)
    assert outputs["present.0.key"] == (4, 2, 1, 16)
    prefill = load_model(lowered / "prefill_s16_t64.onnx")
    assert "last_token_index" in {v.name for v in prefill.graph.inputs}
    assert dims(next(v for v in prefill.graph.outputs if v.name == "present.0.key")) == (1, 2, 16, 16)


def test_what_the_host_copies_per_step_is_small(lowered: Path) -> None:
    """Ids and lengths in, the chosen tokens out; the cache stays on the device."""
    model = load_model(lowered / "decode_b4_t64.onnx")
    moved = [v for v in model.graph.inputs if not (v.name or "").startswith("past_key_values.")]
    moved += [v for v in model.graph.outputs if v.name == "next_token"]
    assert sum(int(np.prod(dims(v))) * v.dtype.itemsize for v in moved if v.dtype is not None) <= 1024


def test_weights_are_stored_once_in_half_precision(fused: Path, lowered: Path) -> None:
    source = sum(entry.size_bytes for graph in Manifest.load(fused).graphs for entry in graph.data)
    data = [entry for graph in Manifest.load(lowered).graphs for entry in graph.data]
    assert {entry.name for entry in data} == {"weights.data"}
    tables = 2 * 2 * (128 + 16) * 16 + 3 * (64 + 128) * 4
    assert data[0].size_bytes <= source / 2 + tables + 4096 * 80  # each tensor begins a page


def test_kernels_of_a_decode_layer(lowered: Path) -> None:
    report = lower_tiny(lowered.parent / "fused", lowered.parent / "again").ascend
    for name, graph in report["graphs"].items():
        assert graph["kernels_per_layer"] <= (20 if name.startswith("decode") else 25)
    layer = report["graphs"]["decode_b4_t64"]["layer"]
    assert layer["NPURmsNorm"] == 2
    assert layer["NPURotaryMul"] == 1  # q and k in one
    assert layer["MatMul"] == 6
    assert "Transpose" not in layer


def test_the_board_without_npu_kernels_gets_standard_operators(fused: Path, tmp_path: Path) -> None:
    report = lower_tiny(fused, tmp_path / "out", "ascend310b4")
    assert any("310B has no RmsNorm kernel" in warning for warning in report.warnings)
    for path in (tmp_path / "out").glob("*.onnx"):
        assert not [n.op_type for n in load_model(path).graph if n.op_type.startswith("NPU")]


def test_another_epsilon_is_spelled_out_and_said(tmp_path: Path) -> None:
    report = lower_tiny(fuse_tiny(tmp_path, rms_norm_eps=1e-5), tmp_path / "out")
    assert [w for w in report.warnings if "epsilon is 1e-05" in w and "spelled out in 5 places" in w]
    counts = Counter(n.op_type for n in load_model(tmp_path / "out" / "decode_b1_t64.onnx").graph)
    assert counts["NPURmsNorm"] == 0
    assert counts["Sqrt"] == 5


def test_scale_goes_into_the_norm_of_qwen3(tmp_path: Path) -> None:
    lower_tiny(fuse_tiny(tmp_path, "qwen3"), tmp_path / "out")
    model = load_model(tmp_path / "out" / "decode_b1_t64.onnx")
    names = [n.name for n in model.graph if n.op_type == "Mul"]
    assert not [name for name in names if "scale" in (name or "")]


@pytest.mark.parametrize(
    ("buckets", "words"),
    [
        (BucketOptions((1,), (4096,), (16,)), "--kv-len 4096: the model has 2048 positions"),
        (BucketOptions((1,), (64,), (128,)), "--prefill-len 128: longer than the smallest KV cache"),
        (BucketOptions((0,), (64,), (16,)), "--batch 0"),
        (BucketOptions((), (64,), (16,)), "--batch"),
    ],
)
def test_impossible_buckets(fused: Path, tmp_path: Path, buckets: BucketOptions, words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        lower_tiny(fused, tmp_path / "out", buckets=buckets)
    assert not (tmp_path / "out").exists()


def test_bfloat16_only_where_the_chip_has_it(fused: Path, tmp_path: Path) -> None:
    lower_tiny(fused, tmp_path / "bf16", dtype="bf16")
    model = load_model(tmp_path / "bf16" / "decode_b1_t64.onnx")
    assert {v.dtype.name for v in model.graph.inputs if v.dtype is not None} == {"INT64", "INT32", "BFLOAT16"}
    with pytest.raises(UnsupportedOpError, match="Ascend310P3 has no bf16 kernels"):
        lower_tiny(fused, tmp_path / "out", "ascend310p3", dtype="bf16")


def test_buckets_beyond_the_memory_of_the_chip(fused: Path, tmp_path: Path) -> None:
    """Two layers of two heads of 16 numbers: 256 bytes of cache a token."""
    huge = BucketOptions((1 << 17,), (1024,), (16,))
    with pytest.raises(
        ShapeError, match=r"decode_b131072_t1024: a KV cache of 34.4 GB .* Ascend910B4 leaves a program"
    ):
        lower_tiny(fused, tmp_path / "out", buckets=huge)
    assert not (tmp_path / "out").exists()


def test_options_of_ascend_for_another_target(fused: Path, tmp_path: Path) -> None:
    with pytest.raises(PassError, match=r"--batch, --kv-len, --attention .* --target is ort"):
        lower_tiny(fused, tmp_path / "out", target="ort", buckets=BucketOptions((2,), (64,), (16,)))


def test_a_graph_lowered_to_another_target(fused: Path, tmp_path: Path) -> None:
    optimize_tiny(fused, tmp_path / "ort", target="ort")
    with pytest.raises(UnsupportedOpError, match=r"lowered to ONNX Runtime's operators.*--target portable"):
        lower_tiny(tmp_path / "ort", tmp_path / "out")


def test_a_graph_that_is_not_fused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOpError, match="no fused attention"):
        optimize_tiny(export_tiny(tmp_path), tmp_path / "out", "clean", target="ascend910b4")


def test_a_lowered_directory_is_no_source(lowered: Path, tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="static graphs for ascend910b4"):
        lower_tiny(lowered, tmp_path / "out")


@pytest.mark.parametrize("target", ["ort", "portable", "ascend910b4"])
def test_a_lowered_graph_is_no_source(lowered: Path, tmp_path: Path, target: str) -> None:
    graph = next(lowered.glob("decode_*.onnx"))
    with pytest.raises(
        GraphError, match=r"decode_.*\.onnx: is a static graph lowered for ascend910b4, and no pass takes"
    ):
        optimize_tiny(graph, tmp_path / "out", target=target)
    for name in (graph.name, "weights.data"):
        (tmp_path / name).symlink_to(lowered / name)
    with pytest.raises(GraphError, match="static graph lowered for an Ascend chip"):
        optimize_tiny(tmp_path / graph.name, tmp_path / "out", target=target)
    assert not (tmp_path / "out").exists()


def test_a_weight_beyond_half_precision_is_named(tmp_path: Path) -> None:
    fused = fuse_tiny(tmp_path)
    model = onnx.load(fused / "model.onnx")
    gamma = next(t for t in model.graph.initializer if t.name == "model.norm.weight")
    values = onnx.numpy_helper.to_array(gamma).copy()
    values[3] = 1e6
    gamma.CopyFrom(onnx.numpy_helper.from_array(values, gamma.name))
    onnx.save(model, tmp_path / "big.onnx")
    with pytest.raises(PassError, match=r"'model.norm.weight' holds 1e\+06.*--ascend-dtype bf16"):
        lower_tiny(tmp_path / "big.onnx", tmp_path / "out", buckets=BUCKETS)
