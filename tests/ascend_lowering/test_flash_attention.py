"""`--attention pfa`: the node as the parser wants it, the same tokens, and what happens where there is no such kernel."""

from pathlib import Path

import numpy as np
import pytest

from qcompile.artifact import load_model
from qcompile.ascend.chips import Cann, chip_named
from qcompile.ascend.legality.check import check_model
from qcompile.ascend.lowering.static_graph import dims
from qcompile.verify import compare_directories
from tests.ascend_lowering.lowered import BucketOptions, fuse_tiny, lower_tiny

SMALL = BucketOptions((1, 2), (128,), (16,))


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def fused(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fuse_tiny(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_same_tokens_legal_and_fewer_kernels(fused: Path, tmp_path: Path, dtype: str) -> None:
    report = lower_tiny(fused, tmp_path / "out", buckets=SMALL, attention="pfa", dtype=dtype).ascend
    assert report["graphs"]["decode_b2_t128"]["kernels_per_layer"] <= 18
    for path in (tmp_path / "out").glob("*.onnx"):
        for cann in (Cann(8, 1), Cann(9, 1)):
            assert check_model(path, chip_named("ascend910b4"), cann).findings == ()
    agreement = compare_directories(fused, tmp_path / "out", num_tokens=24)
    assert agreement.mean_kl < (1e-5 if dtype == "fp16" else 1e-3)


def test_the_form_the_parser_wants(fused: Path, tmp_path: Path) -> None:
    lower_tiny(fused, tmp_path / "out", buckets=SMALL, attention="pfa")
    for name, b, s in (("decode_b2_t128", 2, 1), ("prefill_s16_t128", 1, 16)):
        graph = load_model(tmp_path / "out" / f"{name}.onnx").graph
        nodes = [n for n in graph if n.op_type == "NPUPromptFlashAttention"]
        assert len(nodes) == 2
        assert not [n for n in graph if n.op_type == "Softmax"]
        for node in nodes:
            assert len(node.inputs) == 5
            query, key, value, pse, mask = (v for v in node.inputs if v is not None)
            d = dims(query)[3]
            assert dims(query) == (b, 4, s, d)
            assert dims(key) == dims(value) == (b, 2, 160, d)  # 128 + S, filled up to 32
            assert dims(pse) == (1, 4, s, 160)
            assert pse.const_value is not None
            assert not pse.const_value.numpy().any()
            assert (dims(mask), mask.dtype.name if mask.dtype else "") == ((b, 1, s, 160), "INT8")
            given = {key: attribute.value for key, attribute in node.attributes.items()}
            assert given["input_layout"] == "BNSD_BSND"
            assert given["pre_tokens"] == given["next_tokens"] == 2147483647
            assert (given["num_heads"], given["num_key_value_heads"], given["sparse_mode"]) == (4, 2, 0)
            assert np.isclose(given["scale_value"], 1.0)


def test_chips_without_the_kernel_say_why(fused: Path, tmp_path: Path) -> None:
    report = lower_tiny(fused, tmp_path / "out", "ascend310p3", SMALL, attention="pfa")
    assert any("--attention pfa: the kernel of the 310P takes neither" in warning for warning in report.warnings)
    assert any(n.op_type == "Softmax" for n in load_model(tmp_path / "out" / "decode_b1_t128.onnx").graph)
