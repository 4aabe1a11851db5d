"""What a lowered layer costs in kernels beside what torch.onnx.export makes of one."""

from pathlib import Path

import pytest

from qcompile.ascend.buckets import BucketOptions
from qcompile.ascend.cost import kernels_of
from qcompile.ascend.cost_by_config import TORCH_EXPORT
from qcompile.ascend.legality.onnx_file import read_onnx
from qcompile.ascend.legality.view import GraphView
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
    two, three = (num_kernels(tmp_path, "qwen3", layers, 32) for layers in (2, 3))
    assert abs(three - two - TORCH_EXPORT["qwen3"]) <= 3  # another release of torch may spell a node more or less
    assert TORCH_EXPORT["qwen3"] - TORCH_EXPORT["qwen2"] == 14


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_a_lowered_layer_has_less_than_half_of_them(model_type: str, tmp_path: Path) -> None:
    small = BucketOptions((1,), (64,), (16,))
    record = lower_tiny(fuse_tiny(tmp_path, model_type), tmp_path / "out", buckets=small).ascend
    assert record["torch_export_kernels_per_layer"] == TORCH_EXPORT[model_type]
    assert 2 * record["graphs"]["decode_b1_t64"]["kernels_per_layer"] < TORCH_EXPORT[model_type]
