"""`qcompile plan`: kernels counted by hand, the published points, what the table says, odd input."""

import json
import re
from collections import Counter
from dataclasses import replace

import onnx_ir as ir
import pytest
from click.testing import CliRunner

from qcompile.ascend.buckets import Bucket, BucketOptions
from qcompile.ascend.chips import chip_named
from qcompile.ascend.cost import (
    LAUNCH_GAP_S,
    Kernel,
    estimate,
    kernel_time,
    kernels_of,
    matrix_rate,
)
from qcompile.ascend.cost_by_config import EAGER_EXPORT, SDPA_EXPORT, Sizes, config_kernels
from qcompile.ascend.cost_by_scheme import with_int4, with_int8
from qcompile.ascend.legality.onnx_file import read_onnx
from qcompile.ascend.legality.view import GraphView
from qcompile.ascend.lowering.kernels import count_kernels
from qcompile.ascend.plan import AFTER, BEFORE, INT4, INT8, export_kernels_per_layer, plan_model
from qcompile.cli.plan import command
from qcompile.errors import GraphError, ShapeError
from tests.ascend.graphs import attention_layer, constants, dynamic_w8a8, ones, parsed, saved

CHIP = chip_named("910b4")
QWEN3 = Sizes.of(
    {"model_type": "qwen3", "num_hidden_layers": 28, "hidden_size": 1024, "intermediate_size": 3072, "head_dim": 128}
    | {"num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 151936, "tie_word_embeddings": True}
)
QWEN25 = Sizes.of(
    {"model_type": "qwen2", "num_hidden_layers": 24, "hidden_size": 896, "intermediate_size": 4864, "head_dim": 64}
    | {"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}
)


@pytest.fixture
def directory(tmp_path):
    config = {"hidden_size": 896, "intermediate_size": 4864, "tie_word_embeddings": True}
    shape = {"model_type": "qwen2", "vocab_size": 151936, "num_hidden_layers": 24, "num_attention_heads": 14}
    shape |= {"num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 32768}
    io = {"kv_cache": "concat", "logits": "all", "inputs": [], "outputs": [], "dtype": "float16"}
    graph = {"role": "decoder", "file": {"name": "model.onnx", "size_bytes": 1, "sha256": ""}, "data": [], "io": io}
    record = {"schema_version": 1, "target": "portable", "model": shape, "graphs": [graph], "config": config}
    (tmp_path / "qcompile.json").write_text(json.dumps(record))
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(command, [str(a) for a in arguments], env={"COLUMNS": "80"})


def test_the_roofline_of_one_kernel():
    assert matrix_rate(CHIP) == pytest.approx(245.76e12)
    bytes_bound = kernel_time(Kernel("k", "MatMul", 1.0, 800_000, 0), CHIP)
    assert bytes_bound.low == pytest.approx(1e-6 + LAUNCH_GAP_S)
    assert bytes_bound.high == pytest.approx(2e-6 + LAUNCH_GAP_S)
    work = kernel_time(Kernel("k", "MatMul", 245.76e9, 8), CHIP)
    assert work.low == pytest.approx(1e-3 + LAUNCH_GAP_S)
    int8 = kernel_time(Kernel("k", "MatMul", 245.76e9, 8, is_int8=True), CHIP)
    assert int8.low == pytest.approx(0.5e-3 + LAUNCH_GAP_S)


def test_a_lowered_graph_is_counted_after_what_ge_fuses(tmp_path):
    kernels = kernels_of(GraphView(read_onnx(saved(attention_layer(), tmp_path))))
    by_op = {op: [k for k in kernels if k.op == op] for op in {k.op for k in kernels}}
    assert "Reshape" not in by_op
    assert len(by_op["MatMul"]) == 4
    assert len(by_op["Transpose"]) == 4  # none of them swaps the last two axes
    qkv = by_op["MatMul"][0]
    assert qkv.flops == 2 * 2 * 64 * 192
    assert qkv.weight_bytes == 64 * 192 * 2
    assert qkv.moved_bytes == (2 * 64 + 2 * 192) * 2
    assert qkv.follows_norm
    assert len(kernels) == count_kernels(ir.from_proto(attention_layer())).total


def test_an_int8_graph_works_at_twice_the_rate(tmp_path):
    kernels = kernels_of(GraphView(read_onnx(saved(dynamic_w8a8(), tmp_path))))
    assert [(k.op, k.is_int8) for k in kernels] == [("NPUDynamicQuant", False), ("QuantBatchMatMul", True)]
    assert kernels[1].flops == 2 * 8 * 64 * 32


@pytest.mark.parametrize(("role", "length", "per_layer"), [("decode", 1, 19), ("prefill", 128, 23)])
def test_kernels_per_layer_of_the_lowered_form(role, length, per_layer):
    kernels = config_kernels(QWEN25, Bucket(role, 1, length, 1024))
    assert sum("layers.3." in k.name for k in kernels) == per_layer
    weights = sum(k.weight_bytes for k in kernels)
    assert weights == pytest.approx(2 * QWEN25.parameters, rel=0.001)
    work = 2.0 * length * QWEN25.layers * QWEN25.layer_weights
    assert sum(k.flops for k in kernels if k.weight_bytes and k.name != "lm_head") == pytest.approx(work)


@pytest.mark.parametrize(
    ("sizes", "bucket", "per_layer", "measured_ms", "at_most"),
    [
        (QWEN3, Bucket("decode", 1, 1, 128), SDPA_EXPORT, 7.69, 1.7),
        (QWEN3, Bucket("prefill", 1, 256, 1), SDPA_EXPORT, 80, 9.5),
        (QWEN3, Bucket("prefill", 1, 4096, 1), SDPA_EXPORT, 453, 2.5),
        (QWEN3, Bucket("prefill", 1, 4096, 1), EAGER_EXPORT, 3050, 6.5),
        (QWEN25, Bucket("prefill", 1, 2048, 1), SDPA_EXPORT, 162, 3.3),
    ],
)
def test_published_points_lie_above_the_estimate_by_the_factor_the_docs_say(
    sizes, bucket, per_layer, measured_ms, at_most
):
    cost = estimate(config_kernels(sizes, bucket, per_layer=per_layer, all_logits=True), CHIP)
    assert measured_ms / 1e3 / cost.time.high >= 1.2
    assert measured_ms / 1e3 / cost.time.low <= at_most


def test_the_kernel_count_of_the_published_export():
    kernels = config_kernels(QWEN3, Bucket("prefill", 1, 4096, 1), per_layer=SDPA_EXPORT)
    assert len(kernels) == pytest.approx(1664, rel=0.01)


def test_int8_and_int4_weigh_what_the_passes_store():
    kernels = config_kernels(QWEN25, Bucket("decode", 4, 1, 1024))
    d, f, v, n = QWEN25.hidden, QWEN25.ffn, QWEN25.vocab, QWEN25.layers
    qkv, o, gate_up, down, head = d * 1152, d * d, 2 * d * f, d * f, d * v
    int8, int4 = with_int8(kernels, QWEN25, "910B"), with_int4(kernels, QWEN25, "910B")
    scales = n * (8 * (1152 + 2 * f) + 2 * d + 2 * down // 256) + 2 * head // 128
    rotation = 2 * 2 * (28**2 + 32**2)
    assert sum(k.weight_bytes for k in int8) == pytest.approx(
        n * (qkv + o + gate_up + down) + head + scales + rotation, abs=3
    )
    # qkv and gate_up have a quantizer each, qkv a bias of its own; the tied head is in pieces behind a rotation
    assert len(int8) - len(kernels) == 3 * n + 3 + 7 + 3
    assert Counter(k.op for k in int8 if k.is_int8) == {"QuantBatchMatMul": 2 * n}
    # a scale and an offset per group
    wanted = n * (qkv + o + gate_up + down) * (1 / 2 + 4 / 32) + head * (1 / 2 + 4 / 64)
    assert sum(k.weight_bytes for k in int4) == pytest.approx(wanted, abs=3)
    assert len(int4) - len(kernels) == n + 3


def test_forms_that_a_chip_has_no_kernels_for():
    kernels = config_kernels(QWEN25, Bucket("decode", 1, 1, 64))
    assert with_int4(kernels, QWEN25, "310P") == kernels
    small = Counter(k.op for k in with_int8(kernels, QWEN25, "310B"))
    assert small["AscendQuant"] == small["AscendDequant"] == 2 * QWEN25.layers
    assert "NPUWeightQuantBatchMatmulV2" not in small
    unturned = replace(QWEN25, hidden=10007)  # a prime: no Hadamard matrix
    kernels = config_kernels(unturned, Bucket("decode", 1, 1, 64))
    assert with_int8(kernels, unturned, "910B") == kernels


def test_forms_get_faster_and_smaller(directory):
    plan = plan_model(directory, CHIP, BucketOptions((1, 16), (1024,), (128,)))
    for name in ("decode_b1_t1024", "decode_b16_t1024"):
        rows = {row.form: row for row in plan.rows if row.bucket.name == name}
        assert rows[BEFORE].cost.time.low > rows[AFTER].cost.time.low > rows[INT8].cost.time.low
        assert rows[AFTER].memory.weights > rows[INT8].memory.weights
        assert rows[AFTER].memory.weights > rows[INT4].memory.weights
        assert all(row.memory.fits for row in rows.values())
    cache = {row.memory.cache for row in plan.rows if row.bucket.name == "decode_b16_t1024"}
    assert cache == {2 * 24 * 16 * 1024 * 2 * 64 * 2}


def test_the_command(directory, tmp_path):
    result = run(directory, "--target", "ascend910b4", "--batch", "1,8", "--kernels", "--chart", tmp_path / "plan.html")
    assert result.exit_code == 0, result.output
    assert "decode_b8_t1024" in result.stdout
    rows = [line for line in result.stdout.splitlines() if "decode_b8_t1024" in line and INT8 in line]
    assert len(rows) == 1, "a row is one line, in a pipe too"
    assert re.search(r" \d+\.\d\d - \d+\.\d\d .* \d+ \(\d+ launch-bound\) ", rows[0])
    assert "estimate" in result.stdout
    assert "NPURotaryMul" in result.stdout
    page = (tmp_path / "plan.html").read_text(encoding="utf-8")
    assert "int8 (W8A8 behind norms)" in page
    assert "estimated" in page
    record = json.loads(run(directory, "--target", "910b4", "--json").stdout)
    assert record["estimate"] is True
    assert record["constants"]["bandwidth_bytes_per_s"] == [0.4e12, 0.8e12]
    assert {row["form"] for row in record["rows"]} == {BEFORE, AFTER, INT8, INT4}


def test_an_export_is_counted(directory, tmp_path):
    body = (
        "s = Shape (ids) e = Gather (table, ids) "
        + " ".join(f"y{i} = Sigmoid (e)" for i in range(48))
        + " y = Add (y0, y1)"
    )
    model = parsed(body.replace("ids", "input_ids"), "int64[batch,sequence] input_ids", "float16[batch,sequence,8] y")
    path = saved(constants(model, table=ones(10, 8)), tmp_path, "export.onnx")
    assert export_kernels_per_layer(path, QWEN25, Bucket("decode", 1, 1, 64)) == round(50 / 24)
    result = run(directory, "--target", "910b4", "--before", path)
    assert result.exit_code == 0, result.output
    assert "before fusion: 2 kernels per layer" in result.stdout
    assert "no input_ids" in str(
        run(directory, "--target", "910b4", "--before", saved(attention_layer(), tmp_path)).exception
    )


def test_what_does_not_fit_is_said(directory):
    result = run(directory, "--target", "ascend310b4", "--batch", "32", "--kv-len", "32768")
    assert result.exit_code == 0
    assert "does not fit" in result.stdout
    assert INT8 in result.stdout
    assert INT4 not in result.stdout  # no such kernels on this chip


def test_odd_input(directory, tmp_path):
    with pytest.raises(GraphError, match=r"holds no qcompile\.json"):
        plan_model(tmp_path / "nothing", CHIP, BucketOptions())
    record = json.loads((directory / "qcompile.json").read_text())
    record["config"]["hidden_size"] = "big"
    (directory / "qcompile.json").write_text(json.dumps(record))
    with pytest.raises(ShapeError, match="no hidden_size"):
        plan_model(directory, CHIP, BucketOptions())
    assert isinstance(run(directory, "--target", "910b4", "--batch", "0").exception, ShapeError)
    assert "did you mean" in str(run(directory, "--target", "ascend910b6").exception)


def lowered(directory):
    record = json.loads((directory / "qcompile.json").read_text())
    saved(attention_layer(), directory, "decode_b1_t128.onnx")
    entry = record["graphs"][0] | {"role": "decode", "bucket": [1, 1, 128]}
    entry["file"] = entry["file"] | {"name": "decode_b1_t128.onnx"}
    (directory / "qcompile.json").write_text(json.dumps(record | {"target": "ascend910b4", "graphs": [entry]}))
    return directory


@pytest.mark.parametrize("options", [["--batch", "64"], ["--kv-len", "7"], ["--prefill-len", "128"]])
def test_buckets_of_lowered_graphs_cannot_be_chosen(options, directory):
    result = run(lowered(directory), "--target", "910b4", *options)
    assert result.exit_code == 2
    assert f"has its own buckets: leave out {options[0]}" in result.stderr
    assert result.stdout == ""


def test_graphs_lowered_for_another_chip_are_noted(directory):
    result = run(lowered(directory), "--target", "ascend310p3")
    assert result.exit_code == 0, result.exception
    assert "lowered for ascend910b4, not ascend310p3" in result.stdout
    assert "lowered for" not in run(directory, "--target", "910b4").stdout
