"""qcompile.report.summary and terminal: the numbers of `qcompile inspect`."""

import numpy as np
import onnx_ir as ir
import pytest
from rich.console import Console

from qcompile.model_reader import load_model
from qcompile.report import summarize
from qcompile.report.numbers import compact_count, human_bytes, human_change, printable
from qcompile.report.summary import GraphPort, shape_of
from qcompile.report.terminal import column_labels, group_by_layer, render, shape_text
from qcompile.runtime.manifest import FileEntry, GraphEntry, GraphIO, Manifest, ModelShape
from qcompile.weights_writer import save_model
from tests.report.fused_graphs import EXPORTED, GRAPHS, exported, fused

# tiny-qwen2: embedding 256x64, per layer q 64x64+64, k, v 64x32+32, o 64x64, gate, up, down 64x128, two norms
QWEN2_PARAMETERS = 256 * 64 + 64 + 2 * (2 * 64 * 64 + 64 + 2 * (64 * 32 + 32) + 3 * 64 * 128 + 2 * 64)
# tiny-qwen3: untied, heads of 32, no bias, q_norm and k_norm
QWEN3_PARAMETERS = 2 * 256 * 64 + 64 + 2 * (2 * 64 * 128 + 2 * 64 * 64 + 3 * 64 * 128 + 2 * 64 + 2 * 32)


def _summary(name):
    path = GRAPHS / f"{name}.onnx"
    return summarize(load_model(path), path)


@pytest.mark.parametrize("name", EXPORTED)
def test_every_exporters_parameters_are_those_of_the_checkpoint(name):
    wanted = QWEN2_PARAMETERS if name.startswith("qwen2") else QWEN3_PARAMETERS
    if name == "qwen2-optimum":
        wanted += 256 * 64  # it writes the tied embedding a second time, transposed
    inv_freq = 16 if name.startswith("qwen3") else 8
    assert _summary(name).parameters - wanted in {0, inv_freq}


def test_the_summary_of_an_exported_graph():
    summary = _summary("qwen2-dynamo-sdpa")
    assert summary.num_nodes == 219
    assert summary.ops["MatMul"] == 19
    assert list(summary.ops.values()) == sorted(summary.ops.values(), reverse=True)
    assert summary.opsets == {"": 18}
    assert summary.producer == "pytorch 2.13.0+cpu"
    assert summary.weights["float32"].size_bytes == 4 * summary.weights["float32"].elements
    assert summary.weight_bytes == sum(total.size_bytes for total in summary.weights.values())
    assert summary.inputs[0] == GraphPort("input_ids", "int64", ("batch_size", "sequence_length"))
    assert summary.outputs[1].name == "present.0.key"
    assert summary.fused == {}
    assert summary.files == {"qwen2-dynamo-sdpa.onnx": (GRAPHS / "qwen2-dynamo-sdpa.onnx").stat().st_size}
    record = summary.record()
    assert record["nodes"] == 219
    assert record["weights"]["float32"]["tensors"] == summary.weights["float32"].tensors


def test_fused_functions_and_their_calls():
    summary = summarize(fused("qwen2-builder"), GRAPHS / "fused.onnx")
    assert summary.fused["AddRmsNorm"] == 4
    assert summary.fused["Attention"] == 2
    assert summary.fused["SwiGlu"] == 2
    assert summary.ops["qcompile::AddRmsNorm"] == 4
    assert summary.functions[0].domain == "qcompile"
    assert all(function.body_nodes > 0 for function in summary.functions)
    assert summary.files == {}


def test_shared_weights_count_once_and_data_files_are_listed(tmp_path):
    array = np.zeros((64, 32), np.float32)
    shared = ir.Tensor(array, name="a")
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 18]>
        g (float[1, 64] x) => (float[1, 32] y) { p = MatMul (x, a) q = MatMul (x, b) y = Add (p, q) }
    """)
    for name, node in zip("ab", model.graph, strict=False):
        value = node.inputs[1]
        value.const_value, value.name = shared, name
        value.shape, value.dtype = ir.Shape([64, 32]), ir.DataType.FLOAT
        model.graph.register_initializer(value)
    assert summarize(model, tmp_path / "none.onnx").parameters == 64 * 32
    save_model(model, tmp_path / "g.onnx")
    summary = summarize(load_model(tmp_path / "g.onnx"), tmp_path / "g.onnx")
    assert summary.parameters == 64 * 32
    assert summary.weight_bytes == array.nbytes
    assert summary.files["g.onnx.data"] == array.nbytes


def test_quantized_weights_count_before_packing_and_scales_not_at_all():
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 18, "com.microsoft" : 1, "qcompile" : 1]>
        g (float[1, 64] x) => (float[1, 32] y)
        <uint8[32, 2, 16] packed = {0}, float[64] scales = {1.0}, int8[32, 64] w8 = {0},
         float[32, 2] s8 = {1.0}, int8[8, 8] q = {0}, float[1] q_scale = {1.0}, int8 q_zero = {0},
         int64[2] shape = {1, 32},
         float[7] spare = {0.0}, string[1] words = {"a"}>
        {
          a = com.microsoft.MatMulNBits <K = 64, N = 32, bits = 4, block_size = 32> (x, packed, scales)
          b = qcompile.LinearW8 <block_size = 32> (x, w8, s8)
          c = Add (a, b)
          d = DequantizeLinear (q, q_scale, q_zero)
          y = Reshape (c, shape)
        }
    """)
    summary = summarize(model, GRAPHS / "none.onnx")
    assert summary.parameters == 64 * 32 + 32 * 64 + 64 + 7
    assert summary.weights["uint8"].elements == 32 * 2 * 16
    assert summary.weights["string"].size_bytes == 0
    assert summary.ops["com.microsoft::MatMulNBits"] == 1


def test_the_manifest_adds_target_passes_and_files(tmp_path):
    entry = FileEntry("model.onnx", 1, "0")
    io = GraphIO("concat", "all", (), (), "float32")
    manifest = Manifest(
        target="ort",
        model=ModelShape("qwen2", 1, 1, 1, 1, 1, 1),
        graphs=(GraphEntry("decoder", entry, (), io),),
        files=(FileEntry("tokenizer.json", 5, "0"),),
        passes=({"name": "fuse-rms-norm"},),
        quantization={"bits": 8},
    )
    summary = summarize(exported("qwen2-builder"), tmp_path / "model.onnx", manifest)
    assert summary.target == "ort"
    assert summary.passes[0]["name"] == "fuse-rms-norm"
    assert summary.quantization == {"bits": 8}
    assert summary.files == {"tokenizer.json": 5}


def test_values_without_shape_or_type():
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 18]>
        g (seq(float[2]) s, float x) => (float[N] y) { y = Identity (x) }
    """)
    model.graph.outputs[0].shape = None
    model.graph.outputs[0].type = None
    ports = summarize(model, GRAPHS / "none.onnx")
    assert ports.inputs[0].dtype.startswith("Sequence")
    assert ports.inputs[1].shape == ()
    assert ports.outputs[0] == GraphPort("y", "unknown", None)
    assert shape_of(ir.Shape(["N", 3, None])) == ("N", 3, None)


def _shown(*summaries):
    console = Console(width=150, highlight=False)
    with console.capture() as capture:
        console.print(render(summaries))
    return capture.get()


def test_the_tables_of_one_model():
    text = _shown(_summary("qwen2-dynamo-sdpa"))
    assert "past_key_values.{0…1}.key" in text
    assert "past_sequence_length + sequence_length" in text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    assert rows["MatMul"] == ["19"]
    assert rows["parameters"] == ["90.7", "K"]
    assert rows["float32"][0] == "32"


def test_the_tables_of_two_models_show_the_difference():
    before = _summary("qwen2-builder")
    after = summarize(fused("qwen2-builder"), GRAPHS / "fused.onnx")
    text = _shown(before, after)
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    assert rows["ReduceMean"] == ["5", "-", "gone"]
    assert rows["qcompile::AddRmsNorm"] == ["-", "4", "new"]
    assert rows["nodes"][0] == str(before.num_nodes)
    assert "qwen2-builder.onnx" in text
    assert f"Inputs and outputs of {GRAPHS / 'fused.onnx'}" in text


def test_names_from_the_file_cannot_steer_the_terminal():
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 18]>
        g (float[N] x) => (float[N] y) { y = Identity (x) }
    """)
    model.graph.inputs[0].name = "\x1b[31m[red]x\n"
    model.producer_name = "\x1b]0;title\x07"
    text = _shown(summarize(model, GRAPHS / "none.onnx"))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert r"\x1b[31m[red]x\n" in text


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (("a/model.onnx",), [""]),
        (("a/model.onnx", "b/model.onnx"), ["a", "b"]),
        (("x.onnx", "y.onnx"), ["x.onnx", "y.onnx"]),
        (("x.onnx", "x.onnx"), ["first", "second"]),
        (("model.onnx", "out/model.onnx"), ["model.onnx", "out/model.onnx"]),
    ],
)
def test_column_labels_are_the_ends_that_differ(paths, labels):
    summary = _summary("qwen2-builder")
    summaries = [summary.__class__(**(vars(summary) | {"path": path})) for path in paths]
    assert column_labels(summaries) == labels


def test_ports_that_differ_in_the_layer_number_share_a_row():
    ports = [GraphPort(f"past.{i}.key", "float16", ("B", 2)) for i in range(3)]
    ports += [GraphPort("logits", "float32", None), GraphPort("past.7.value", "float16", ("B", 2))]
    assert group_by_layer(ports) == [
        ("past.{0…2}.key", "float16", "[B, 2]"),
        ("logits", "float32", "?"),
        ("past.7.value", "float16", "[B, 2]"),
    ]
    assert shape_text((None, 3)) == "[?, 3]"


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (10 * 1024, "10.0 KiB"), (1976143360, "1.84 GiB")],
)
def test_bytes(size, text):
    assert human_bytes(size) == text


def test_other_numbers():
    assert compact_count(494032768) == "494 M"
    assert compact_count(999) == "999"
    assert human_bytes(5 << 50) == "5120 TiB"
    assert human_change(4, 1) == "−75.0 %"
    assert human_change(4, 6) == "+50.0 %"
    assert (human_change(3, 3), human_change(0, 3), human_change(3, 0)) == ("=", "new", "gone")
    assert printable("a\u202eb\ud800é中") == "a\\u202eb\\ud800é中"
