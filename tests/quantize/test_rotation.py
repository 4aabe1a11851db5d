"""The rotated residual stream computes the same, and only where everything on it can follow."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.artifact import load_model
from qcompile.passes import quantize_rotation
from qcompile.passes.base import PassContext
from qcompile.passes.proof import Prover
from qcompile.passes.quantize_rotation import RotateResidual
from qcompile.quant.hadamard import hadamard_rotation
from qcompile.verify import compare_directories
from tests.optimized import optimize_tiny


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_the_model_stays_the_same(exported, tmp_path, kind):
    report = optimize_tiny(exported[kind], tmp_path / "out", "fuse", "rotate-residual")
    result = next(r for r in report.results if r.name == "rotate-residual")
    assert result.rewrites == 1
    assert result.proved == 9
    assert result.max_error < 2e-5
    assert compare_directories(exported[kind], tmp_path / "out", num_tokens=8).holds(quantized=False)


def test_every_weight_on_the_stream_is_rotated_and_others_are_not(context):
    before = {n.name: n.inputs[1] for n in context.model.graph if n.op_type in {"MatMul", "Linear"}}
    table = next(n for n in context.model.graph if n.op_type == "Gather").inputs[0].const_value.numpy()
    RotateResidual()(context)
    after = {n.name: n.inputs[1] for n in context.model.graph if n.name in before}
    rotated = {name for name, value in after.items() if value is not before[name]}
    assert len([name for name in rotated if name.endswith(("qkv_proj", "o_proj", "gate_up_proj", "down_proj"))]) == 8
    new_table = next(n for n in context.model.graph if n.op_type == "Gather").inputs[0].const_value.numpy()
    np.testing.assert_allclose(new_table, hadamard_rotation(table.shape[1]).apply(table), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(new_table, axis=1), np.linalg.norm(table, axis=1), rtol=1e-4)


def test_rows_and_columns_of_rotated_weights_are_of_one_matrix(context):
    RotateResidual()(context)
    for node in context.model.graph:
        tensor = node.inputs[1].const_value if len(node.inputs) > 1 and node.inputs[1] is not None else None
        if hasattr(tensor, "columns"):
            whole = tensor.numpy()
            np.testing.assert_allclose(tensor.columns(3, 11), whole[:, 3:11].T, atol=1e-5)
            np.testing.assert_allclose(tensor.rows(2, 9), whole[2:9], atol=1e-5)


def test_an_outlier_channel_is_spread(context):
    table = next(n for n in context.model.graph if n.op_type == "Gather").inputs[0]
    array = table.const_value.numpy().copy()
    array[:, 5] += 50
    table.const_value = ir.tensor(array, name=table.name)
    RotateResidual()(context)
    new = next(n for n in context.model.graph if n.op_type == "Gather").inputs[0].const_value.numpy()
    assert np.abs(array).max(axis=1).mean() > 45
    assert np.abs(new).max(axis=1).mean() < 12


def test_an_unfused_graph_is_left_alone_with_the_reason(exported):
    context = PassContext(load_model(exported["qwen2"] / "model.onnx"), Prover())
    result = RotateResidual()(context)
    assert result.rewrites == 0
    assert "reads the residual stream; only RmsNorm can follow a rotation" in result.rejected[0].reason


def test_something_else_on_the_stream_forbids_it(context):
    norm = next(n for n in context.model.graph if n.op_type == "AddRmsNorm")
    tap = ir.node("Tanh", [norm.outputs[1]])
    context.model.graph.append(tap)
    tap.outputs[0].name = "tapped"
    context.model.graph.outputs.append(tap.outputs[0])
    result = RotateResidual()(context)
    assert result.rewrites == 0
    assert "Tanh" in result.rejected[0].reason


def test_a_wrong_rotation_is_not_proved(context, monkeypatch):
    right = quantize_rotation._sylvester
    monkeypatch.setattr(quantize_rotation, "_sylvester", lambda power: right(power) * 1.01)
    names = [n.name for n in context.model.graph]
    result = RotateResidual()(context)
    assert result.rewrites == 0
    assert result.rejected[0].reason.startswith("rolled back")
    assert [n.name for n in context.model.graph] == names


def test_a_stream_is_rotated_once_also_over_two_runs(exported, tmp_path):
    """What compares hidden states turns back one rotation, and a second one gains nothing."""
    optimize_tiny(exported["qwen2"], tmp_path / "rotated", "fuse", "rotate-residual", target="portable", verify="off")
    report = optimize_tiny(tmp_path / "rotated", tmp_path / "out", "int8")
    result = next(r for r in report.results if r.name == "rotate-residual")
    assert [r.reason for r in result.rejected] == ["the residual stream was rotated before"]
    assert result.rewrites == 0
    assert report.ops_after == optimize_tiny(exported["qwen2"], tmp_path / "once", "fuse", "int8").ops_after
