"""Each kernel against the function it replaces, and the interface changes, on the tiny models."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.artifact import load_model
from qcompile.passes import gqa_proof
from qcompile.passes.base import PassContext, PassResult, op_histogram
from qcompile.passes.gqa_proof import prove_lowered_attention
from qcompile.passes.lower_attention_to_ort import LowerAttentionToOrt
from qcompile.passes.lower_to_ort import LowerToOrt
from qcompile.passes.lower_weights_to_ort import LowerWeightsToOrt
from qcompile.passes.proof import Prover
from qcompile.passes.rope_table import RopeTable, tabulate
from qcompile.passes.select_last_token import SelectLastToken
from tests.optimized import export_tiny, optimize_tiny


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fused")
    optimize_tiny(export_tiny(directory), directory / "out", target="portable")
    return directory / "out"


@pytest.fixture
def context(fused):
    return PassContext(load_model(fused / "model.onnx"), Prover())


def nodes(context, op_type):
    return [n for n in context.model.graph if n.op_type == op_type]


def test_every_function_with_a_kernel_is_replaced_and_proved(context):
    result = LowerToOrt()(context)
    assert result.rewrites == result.proved == result.matches
    assert not result.rejected
    assert 0 < result.max_error < 2e-5
    left = {name for name in op_histogram(context.model) if name.startswith("qcompile::")}
    assert left == {"qcompile::Attention"}


def test_the_absent_outputs_of_the_skip_norm_stay_absent(context):
    LowerToOrt()(context)
    for node in nodes(context, "SkipSimplifiedLayerNormalization"):
        assert [v.name for v in node.outputs[1:3]] == ["", ""]


def test_attention_takes_the_packed_projection_whole(context):
    result = LowerAttentionToOrt(64)(context)
    assert result.rewrites == result.proved == 2
    kernel = nodes(context, "GroupQueryAttention")[0]
    assert kernel.inputs[1] is None
    assert kernel.inputs[2] is None
    assert kernel.attributes["do_rotary"].as_int() == 1
    names = [v.name for v in context.model.graph.inputs]
    assert "attention_mask" not in names
    assert "position_ids" not in names
    assert {"seqlens_k", "total_sequence_length"} <= set(names)


def test_the_rotary_table_is_cos_and_sin_of_position_times_frequency(context):
    attention = nodes(context, "Attention")[0]
    table = tabulate(attention.inputs[5], attention.inputs[6], 50)
    assert isinstance(table, RopeTable)
    half = table.cos.shape[1]
    frequency = 1e6 ** (-np.arange(half) / half)
    angle = np.arange(50)[:, None] * frequency[None]
    np.testing.assert_allclose(table.cos, np.cos(angle), atol=2e-6)
    np.testing.assert_allclose(table.sin, np.sin(angle), atol=2e-6)


def test_dynamic_ntk_beyond_its_first_context_stays_outside_the_kernel(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    source = export_tiny(tmp_path, "qwen2", rope_parameters=rope, max_position_embeddings=32)
    optimize_tiny(source, tmp_path / "fused", target="portable")
    context = PassContext(load_model(tmp_path / "fused" / "model.onnx"), Prover())
    result = LowerAttentionToOrt(100)(context)
    assert result.rewrites == result.proved == 2
    assert "dynamic NTK" in result.detail["rotary"]
    assert nodes(context, "GroupQueryAttention")[0].attributes["do_rotary"].as_int() == 0
    assert len(nodes(context, "RotaryEmbedding")) == 4
    assert "position_ids" in [v.name for v in context.model.graph.inputs]


@pytest.mark.parametrize("change", ["scale", "swapped table", "shifted table"])
def test_a_wrong_attention_is_not_proved(context, change, monkeypatch):
    attention = nodes(context, "Attention")[0]
    table = tabulate(attention.inputs[5], attention.inputs[6], 64)
    assert prove_lowered_attention(attention, table, Prover())[0] == ""
    kernel_model = gqa_proof._kernel_model
    if change == "scale":
        wrong = lambda s, with_rotary: kernel_model(  # noqa: E731
            gqa_proof._Shape(s.num_heads, s.kv_num_heads, s.head_dim, s.scale * 1.1), with_rotary=with_rotary
        )
        monkeypatch.setattr(gqa_proof, "_kernel_model", wrong)
    else:
        run = Prover.run

        def with_other_table(self, model_bytes, feeds):
            if "seqlens_k" in feeds:
                tables = {"cos": feeds["sin"], "sin": feeds["cos"]}
                if change == "shifted table":
                    tables = {name: np.roll(feeds[name], 1, axis=0) for name in ("cos", "sin")}
                feeds = feeds | tables
            return run(self, model_bytes, feeds)

        monkeypatch.setattr(Prover, "run", with_other_table)
    reason, error = prove_lowered_attention(attention, table, Prover())
    assert "relative error" in reason
    assert error > 1e-3


def test_a_cache_read_by_something_else_is_left_alone(context):
    graph = context.model.graph
    cache = next(v for v in graph.inputs if v.name == "past_key_values.0.key")
    extra = ir.node("Identity", [cache])
    graph.append(extra)
    graph.outputs.append(extra.outputs[0])
    result = LowerAttentionToOrt()(context)
    assert result.rewrites == 0
    assert "some KV cache tensors" in result.rejected[0].reason
    assert len(nodes(context, "Attention")) == 2


def test_logits_are_selected_before_the_vocabulary_projection(context):
    result = SelectLastToken()(context)
    assert result.rewrites == 1
    head = next(n for n in context.model.graph if n.name == "lm_head")
    assert head.inputs[0].producer().op_type == "Unsqueeze"
    logits = next(v for v in context.model.graph.outputs if v.name == "logits")
    assert logits.shape[1] == 1
    assert SelectLastToken()(context).rewrites == 0


def test_the_tied_head_reads_the_embedding_in_place(context):
    table = next(n for n in context.model.graph if n.op_type == "Gather").inputs[0]
    SelectLastToken()(context)
    result = LowerWeightsToOrt()(context)
    assert result.rewrites == result.proved == 1
    gemm = nodes(context, "Gemm")[0]
    assert gemm.inputs[1] is table
    assert gemm.attributes["transB"].as_int() == 1


def test_results_are_json_ready():
    assert PassResult("x").record()["rewrites"] == 0
