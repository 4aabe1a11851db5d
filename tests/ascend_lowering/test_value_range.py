"""How large values become on text is measured before float16 is chosen for them."""

from pathlib import Path

import numpy as np
import pytest

from qcompile.artifact import load_model
from qcompile.ascend.chips import Cann, chip_named
from qcompile.ascend.legality.check import check_model
from qcompile.ascend.lowering.static_graph import dims
from qcompile.errors import VerifyError
from qcompile.export.export_checkpoint import export_checkpoint
from qcompile.verify import compare_directories
from tests.ascend_lowering.lowered import BucketOptions, fuse_tiny, lower_tiny
from tests.optimized import optimize_tiny
from tests.tiny_checkpoints import random_tensors, tiny_config, write_safetensors, write_tiny_checkpoint

SMALL = BucketOptions((2,), (128,), (16,))


def fused_with(directory: Path, change) -> Path:
    """Fuse a tiny checkpoint whose tensors were changed."""
    untied = {"tie_word_embeddings": False}
    write_tiny_checkpoint(directory / "checkpoint", **untied)
    tensors = random_tensors(tiny_config(**untied))
    change(tensors)
    write_safetensors(directory / "checkpoint" / "model.safetensors", tensors, "float32")
    export_checkpoint(str(directory / "checkpoint"), directory / "exported")
    optimize_tiny(directory / "exported", directory / "fused", target="portable")
    return directory / "fused"


def raise_the_stream(tensors: dict[str, np.ndarray]) -> None:
    """Let two channels of every embedding be 50,000, and one layer put more on top: half precision ends at 65,504."""
    tensors["model.embed_tokens.weight"][:, :2] = 50000.0
    tensors["model.layers.1.mlp.down_proj.weight"][:2] *= 1e5


def test_what_was_measured_is_in_the_record(tmp_path: Path) -> None:
    report = lower_tiny(fuse_tiny(tmp_path), tmp_path / "out", buckets=SMALL, verify="fast")
    ranges = report.ascend["ranges"]
    assert len(ranges["residual_sums"]) == 4  # two layers, two sums each
    assert all(0 < largest < 100 for largest in ranges["residual_sums"].values())
    assert ranges["num_tokens"] > 100
    assert ranges["float32_sums"] == []
    assert not report.warnings


def test_sums_beyond_half_precision_are_in_float32(tmp_path: Path) -> None:
    fused = fused_with(tmp_path, raise_the_stream)
    report = lower_tiny(fused, tmp_path / "out", buckets=SMALL, verify="fast")
    (warning,) = [w for w in report.warnings if "residual stream" in w]
    assert "float16 ends at 65504" in warning
    assert "'layers.0.residual'" in warning or "layers.0" in warning
    assert len(report.ascend["ranges"]["float32_sums"]) == 4
    graph = load_model(tmp_path / "out" / "decode_b2_t128.onnx").graph
    norms = [n for n in graph if n.op_type == "NPURmsNorm"]
    types = [n.inputs[0].dtype.name for n in norms if n.inputs[0] is not None and n.inputs[0].dtype is not None]
    assert types == ["FLOAT16", *["FLOAT"] * 4]
    assert all(dims(n.outputs[0])[-1] for n in norms)
    for path in (tmp_path / "out").glob("*.onnx"):
        assert check_model(path, chip_named("ascend910b4"), Cann(8, 1)).findings == ()
    agreement = compare_directories(fused, tmp_path / "out", num_tokens=12)
    assert np.isfinite(agreement.max_logit_difference)
    assert agreement.same_tokens >= agreement.num_tokens - 2


def test_without_the_measurement_they_overflow(tmp_path: Path) -> None:
    """The test above would not hold by itself."""
    fused = fused_with(tmp_path, raise_the_stream)
    lower_tiny(fused, tmp_path / "out", buckets=SMALL)
    with pytest.raises(VerifyError, match=r"the logits of prompt 0, token 0 are infinite or NaN.*--ascend-dtype bf16"):
        compare_directories(fused, tmp_path / "out", num_tokens=12)


def test_a_product_beyond_half_precision_is_named(tmp_path: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"] *= 300
        tensors["model.layers.1.mlp.down_proj.weight"] *= 3e4

    report = lower_tiny(fused_with(tmp_path, change), tmp_path / "out", buckets=SMALL, verify="fast")
    assert [w for w in report.warnings if "layers.1.mlp.down_proj" in w and "--ascend-dtype bf16" in w]


@pytest.mark.parametrize("dtype", ["bf16"])
def test_bfloat16_needs_no_measurement(tmp_path: Path, dtype: str) -> None:
    fused = fused_with(tmp_path, raise_the_stream)
    report = lower_tiny(fused, tmp_path / "out", buckets=SMALL, verify="fast", dtype=dtype)
    assert report.ascend["ranges"] == {}
    assert not report.warnings
