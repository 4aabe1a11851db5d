import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from qcompile.calibration.blocks import split_blocks
from qcompile.calibration.runner import BlockRunner, feeds_of
from qcompile.errors import QuantError
from qcompile.runtime.ort_options import session_options

ROWS = [np.arange(7, dtype=np.int64) * 31 % 400, np.arange(12, dtype=np.int64) * 17 % 400]


def projection_inputs(model: ir.Model) -> list[ir.Value]:
    """Every first input of a MatMul or Linear that reads a weight, and the logits."""
    found = [
        node.inputs[0]
        for node in model.graph
        if node.op_type in {"MatMul", "Linear", "Gemm"}
        and (node.inputs[1].const_value is not None or node.inputs[1].producer().op_type == "Transpose")
        and node.inputs[0].producer() is not None
    ]
    logits = next(v for v in model.graph.outputs if v.name == "logits")
    return list(dict.fromkeys([*found, logits]))


def whole_graph(directory, names, row):
    """Run the file as it is, asking ONNX Runtime for inner values too."""
    model = ir.load(directory / "model.onnx")
    known = {v.name: v for n in model.graph for v in n.outputs}
    present = {v.name for v in model.graph.outputs}
    model.graph.outputs.extend(known[n] for n in names if n not in present)
    path = directory / "asked.onnx"
    ir.save(model, path)
    session = onnxruntime.InferenceSession(str(path), session_options(onnxruntime), providers=["CPUExecutionProvider"])
    feeds = {v.name: a for v, a in feeds_of(model.graph, row)}
    try:
        return dict(zip(names, session.run(names, feeds), strict=True))
    finally:
        path.unlink()


@pytest.mark.parametrize("memory_bytes", [1 << 30, 0])
@pytest.mark.parametrize("kind", ["plain", "fused", "qwen3"])
def test_blocks_compute_what_the_whole_graph_computes(models, directories, kind, memory_bytes):
    model = models[kind]
    wanted = projection_inputs(model)
    seen = {}
    ended = []
    runner = BlockRunner(model, wanted, memory_bytes=memory_bytes)
    runner.run(ROWS, lambda row, v, a: seen.__setitem__((row, v.name), a), ended.append, lambda *progress: None)
    assert ended == list(range(len(runner.blocks)))
    names = [v.name for v in wanted]
    assert len(seen) == len(ROWS) * len(names)
    for index, row in enumerate(ROWS):
        for name, array in whole_graph(directories[kind], names, row).items():
            assert np.allclose(seen[index, name], array, atol=2e-4), name


def test_there_is_one_block_per_layer_and_one_for_what_comes_before(models):
    for kind in ("plain", "fused"):
        blocks = split_blocks(models[kind].graph, projection_inputs(models[kind]))
        assert len(blocks) == 3 + 1
        for number, block in enumerate(blocks):
            names = {v.name for v in block.reads if (v.name or "").startswith("past_key_values.")}
            assert names <= {f"past_key_values.{number - 1}.{kind}" for kind in ("key", "value")}


def test_weights_are_read_in_the_block_that_needs_them_and_nothing_else_is_computed(models):
    model = models["fused"]
    inputs = [v for v in projection_inputs(model) if v.name != "logits"]
    blocks = split_blocks(model.graph, inputs)
    assert "lm_head" not in {n.name for b in blocks for n in b.nodes}
    first = split_blocks(model.graph, inputs[:1])
    assert len(first) == 1
    whole = split_blocks(model.graph, projection_inputs(model))
    transposes = [(i, n.name) for i, b in enumerate(whole) for n in b.nodes if n.op_type == "Transpose"]
    assert [i for i, _ in transposes] == [3]


def test_blocks_of_equal_structure_share_a_session(models):
    runner = BlockRunner(models["fused"], projection_inputs(models["fused"]))
    sessions = [runner.session(i, {}).session for i in range(4)]
    assert sessions[1] is sessions[2]
    assert len({id(s) for s in sessions}) == 3
    with pytest.raises(QuantError, match="no text to run the model on"):
        runner.run([], lambda r, v, a: None, lambda i: None, lambda *p: None)


def test_half_precision_is_widened(models, directories):
    model = models["bf16"]
    wanted = projection_inputs(model)
    seen = {}
    BlockRunner(model, wanted).run(ROWS[:1], lambda r, v, a: seen.update({v.name: a}), lambda i: None, lambda *p: None)
    assert {a.dtype for a in seen.values()} == {np.dtype(np.float32)}
    assert all(np.isfinite(a).all() for a in seen.values())


def test_a_lowered_graph_runs_too(models):
    model = models["ort"]
    wanted = [
        n.inputs[0] for n in model.graph if n.op_type in {"MatMul", "Gemm"} and n.inputs[0].producer() is not None
    ]
    plain = {}
    reference = projection_inputs(models["plain"])
    BlockRunner(models["plain"], reference).run(
        ROWS, lambda r, v, a: plain.update({(r, v.name): a}), lambda i: None, lambda *p: None
    )
    seen = {}
    BlockRunner(model, wanted).run(ROWS, lambda r, v, a: seen.update({(r, v.name): a}), lambda i: None, lambda *p: None)
    shared = [key for key in seen if key in plain and seen[key].shape == plain[key].shape]
    assert len(shared) >= 6
    for key in shared:
        assert np.allclose(seen[key], plain[key], atol=2e-4), key


def test_inputs_that_cannot_be_fed_are_named(models):
    model = models["fused"]
    model.graph.inputs[0].shape = ir.Shape([1, 1])
    with pytest.raises(QuantError, match=r"'input_ids' is fixed to \['1', '1'\] and would be fed \[1, 7\]"):
        dict(feeds_of(model.graph, ROWS[0]))
    model.graph.inputs[0].name = "pixels"
    with pytest.raises(QuantError, match="input 'pixels' that it does not know"):
        dict(feeds_of(model.graph, ROWS[0]))


def test_a_block_that_cannot_run_says_where(models):
    model = models["fused"]
    rows = [np.array([10**6], np.int64)]
    runner = BlockRunner(model, projection_inputs(model))
    with pytest.raises(QuantError, match="cannot run the block from 'embed_tokens'"):
        runner.run(rows, lambda r, v, a: None, lambda i: None, lambda *p: None)
