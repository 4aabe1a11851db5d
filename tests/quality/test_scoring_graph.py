"""The residual stream and the logits of every position, found in whatever graph the model is in."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.artifact import load_model, save_model
from qcompile.errors import GraphError
from qcompile.quality.models import open_model
from qcompile.quality.residual_stream import residual_stream
from qcompile.quality.scorer import Scorer
from qcompile.quality.scoring_graph import remove_last_token_selection, scoring_graph
from tests.optimized import export_tiny, optimize_tiny
from tests.runtime.toy_compiler import compile_tiny

GRAPHS = Path(__file__).parents[1] / "data" / "graphs"
IDS = np.random.default_rng(3).integers(0, 256, 23)


def outputs_of(path, ids=IDS, chunk=23):
    """Logits [S, V] and the stream [2 layers, S, D]."""
    scorer = Scorer(open_model(path), 64, 1)
    scored = [scorer.extend(ids[i : i + chunk]) for i in range(0, len(ids), chunk)]
    logits = np.concatenate([s.logits for s in scored])
    stream = np.array([np.concatenate(rows) for rows in zip(*(s.stream for s in scored), strict=True)])
    scorer.close()
    return logits, stream


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_exporters_agree_on_what_the_stream_is(model_type):
    """The graphs hold the same weights, so the same hidden states must come out of all of them."""
    paths = sorted(GRAPHS.glob(f"{model_type}-*.onnx"))
    wanted_logits, wanted = outputs_of(GRAPHS / f"{model_type}-builder.onnx")
    assert wanted.shape == (4, len(IDS), 64)
    assert len(paths) >= 5
    for path in paths:
        logits, stream = outputs_of(path)
        limit = 3e-2 if "fp16" in path.name else 1e-4
        np.testing.assert_allclose(stream, wanted, atol=limit * 10, rtol=limit, err_msg=path.name)
        np.testing.assert_allclose(logits, wanted_logits, atol=limit * 10, rtol=limit, err_msg=path.name)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export_tiny(tmp_path_factory.mktemp("exported"))


@pytest.mark.parametrize(("target", "passes"), [("portable", ()), ("ort", ()), ("ort", ("fuse-rms-norm",))])
def test_fused_graphs_keep_the_stream(exported, tmp_path, target, passes):
    optimize_tiny(exported, tmp_path / "out", *passes, target=target)
    wanted_logits, wanted = outputs_of(exported)
    logits, stream = outputs_of(tmp_path / "out")
    np.testing.assert_allclose(stream, wanted, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(logits, wanted_logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.parametrize(("kv_cache", "logits"), [("shared", "last"), ("shared", "all"), ("concat", "last")])
def test_every_interface_gives_every_logit(tmp_path, kv_cache, logits, chunk):
    compiled = compile_tiny(tmp_path / "a", kv_cache=kv_cache, logits=logits)
    wanted, _ = outputs_of(compile_tiny(tmp_path / "b", kv_cache="concat", logits="all"), chunk=len(IDS))
    seen, _ = outputs_of(compiled, chunk=chunk)
    np.testing.assert_allclose(seen, wanted, atol=1e-4, rtol=1e-4)


def test_a_graph_that_only_gives_the_last_position_is_run_token_by_token(exported, tmp_path):
    """The selection is spelled in a way that is not recognised: a Slice right before the logits."""
    model = load_model(exported / "model.onnx")
    graph = model.graph
    logits = graph.outputs[0]
    ends = [ir.tensor(np.array([n], np.int64), name=f"slice.{n}") for n in (-1, 2**62, 1)]
    values = [ir.Value(name=t.name, const_value=t, type=ir.TensorType(t.dtype), shape=t.shape) for t in ends]
    for value in values:
        graph.register_initializer(value)
    last = ir.node("Slice", [logits, *values])
    logits.name, last.outputs[0].name = "all_logits", "logits"
    last.outputs[0].type = logits.type
    last.outputs[0].shape = ir.Shape([1, 1, logits.shape[2]])
    graph.append(last)
    graph.outputs[0] = last.outputs[0]
    (tmp_path / "sliced").mkdir()
    save_model(model, tmp_path / "sliced" / "model.onnx")
    wanted, _ = outputs_of(exported)
    for chunk in (23, 4):
        seen, stream = outputs_of(tmp_path / "sliced" / "model.onnx", chunk=chunk)
        np.testing.assert_allclose(seen, wanted, atol=1e-4, rtol=1e-4)
        assert stream.shape == (4, len(IDS), 64)


def test_selection_is_removed_without_loading_weights(exported, tmp_path):
    optimize_tiny(exported, tmp_path / "out")
    model = load_model(tmp_path / "out" / "model.onnx")
    assert remove_last_token_selection(model.graph)
    assert "last_token_index" not in [v.name for v in model.graph.inputs]
    assert not [n for n in model.graph if n.op_type == "GatherND"]
    graph = scoring_graph(tmp_path / "out" / "model.onnx", 2, with_stream=False)
    weights = (tmp_path / "out" / "model.onnx.data").stat().st_size
    assert len(graph.model_bytes) < weights / 3


def test_a_reset_forgets_the_text(exported):
    scorer = Scorer(open_model(exported), 64, 1)
    first = scorer.extend(IDS).logits
    scorer.reset()
    np.testing.assert_array_equal(scorer.extend(IDS).logits, first)


def test_a_graph_without_layers_says_so():
    model = load_model(GRAPHS / "qwen2-builder.onnx")
    with pytest.raises(GraphError, match="4 residual sums lead to the logits, 6 are wanted for 3 layers"):
        residual_stream(model.graph, 3)
    graph = scoring_graph(GRAPHS / "qwen2-builder.onnx", 3, with_stream=True)
    assert graph.stream == ()
    assert "6 are wanted" in graph.stream_reason
