"""What a lowered layer costs in kernels beside what torch.onnx.export makes of one."""

from collections import Counter
from pathlib import Path

import pytest

from qcompile.artifact import load_model
from qcompile.ascend.buckets import BucketOptions
from qcompile.ascend.cost import kernels_of
from qcompile.ascend.cost_by_config import TORCH_EXPORT
from qcompile.ascend.legality.onnx_file import read_onnx
from qcompile.ascend.legality.view import GraphView
from qcompile.ascend.lowering.static_graph import dims
from qcompile.export.torch_tracer import trace_checkpoint
from tests.ascend_lowering.lowered import fuse_tiny, lower_tiny
from tests.tiny_checkpoints import write_tiny_checkpoint

B, S, T = 1, 1, 64


def num_kernels(directory: Path, model_type: str, layers: int, head: int) -> int:
    """Export with torch.onnx.export and count the kernels of a decode step."""
    source = write_tiny_checkpoint(directory / f"in-{layers}", model_type, num_hidden_layers=layers)
    trace_checkpoint(str(source), directory / f"traced-{layers}")
    shapes = {"input_ids": (B, S), "position_ids": (B, S), "attention_mask": (B, T + S)}
    for layer in range(layers):
        shapes |= {f"past_key_values.{layer}.{kind}": (B, 2, T, head) for kind in ("key", "value")}
    return len(kernels_of(GraphView(read_onnx(directory / f"traced-{layers}" / "model.onnx"), shapes)))


@pytest.mark.torch
def test_the_count_of_a_torch_export(tmp_path: Path) -> None:
    """Of Qwen3; Qwen2 has as many fewer as the norms of q and k make."""
    pytest.importorskip("torch")
    one, two = (num_kernels(tmp_path, "qwen3", layers, 32) for layers in (1, 2))
    assert abs(two - one - TORCH_EXPORT["qwen3"]) <= 3  # another release of torch may spell a node more or less
    assert TORCH_EXPORT["qwen3"] - TORCH_EXPORT["qwen2"] == 14


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_a_lowered_layer_has_a_third_of_them(model_type: str, tmp_path: Path) -> None:
    small = BucketOptions((1,), (64,), (16,))
    record = lower_tiny(fuse_tiny(tmp_path, model_type), tmp_path / "out", buckets=small).ascend
    assert record["torch_export_kernels_per_layer"] == TORCH_EXPORT[model_type]
    assert record["graphs"]["decode_b1_t64"]["kernels_per_layer"] == {"qwen2": 19, "qwen3": 20}[model_type]


def test_head_norms_and_rotation_are_two_kernels_in_a_decode_step(tmp_path: Path) -> None:
    """The gammas of Qwen3's heads are in the angles, made once per step for all layers."""
    lower_tiny(fuse_tiny(tmp_path, "qwen3"), tmp_path / "out", buckets=BucketOptions((2,), (64,), (16,)))
    decode = load_model(tmp_path / "out" / "decode_b2_t64.onnx").graph
    layer = Counter(n.op_type for n in decode if (n.name or "").startswith("layers.0.attn"))
    assert (layer["NPURmsNorm"], layer["NPURotaryMul"], layer["Split"]) == (1, 1, 2)
    angles = [dims(n.inputs[1]) for n in decode if n.op_type == "NPURotaryMul" and n.inputs[1] is not None]
    assert angles == [(2, 1, 6, 32)] * 2
    prefill = load_model(tmp_path / "out" / "prefill_s16_t64.onnx").graph
    layer = Counter(n.op_type for n in prefill if (n.name or "").startswith("layers.0.attn"))
    assert (layer["NPURmsNorm"], layer["NPURotaryMul"]) == (2, 2)
