"""Quantized operators on ONNX Runtime's kernels: proved, shared, refused when wrong; what really runs after loading."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.artifact import load_model
from qcompile.calibration.accumulate import KeyValueStatistics
from qcompile.errors import PassError, UnsupportedOpError
from qcompile.loaded_model import inspect_loaded
from qcompile.passes import lower_quantized_activations_to_ort as activations
from qcompile.passes import lower_quantized_blocks_to_ort as blocks
from qcompile.passes.base import op_histogram
from qcompile.passes.lower_quantized_activations_to_ort import LowerQuantizedActivationsToOrt
from qcompile.passes.lower_quantized_blocks_to_ort import LowerQuantizedBlocksToOrt
from qcompile.passes.quantize_int4 import QuantizeInt4
from qcompile.passes.quantize_int8 import QuantizeInt8, QuantizeInt8Dynamic, QuantizeInt8Static
from qcompile.passes.quantize_kv8 import cache_scales
from qcompile.quantize_options import LayerOptions, QuantizeOptions
from qcompile.runtime.manifest import Manifest
from qcompile.verify import compare_directories
from tests.optimized import export_tiny, optimize_tiny
from tests.quantize.test_quantize_model import Seen

SYMMETRIC = QuantizeOptions(symmetric=True)


def nodes(context, op_type):
    return [n for n in context.model.graph if n.op_type == op_type]


@pytest.mark.parametrize(
    "scheme",
    [
        QuantizeInt8(),
        QuantizeInt8(QuantizeOptions(group_size="channel")),
        QuantizeInt4(),
        QuantizeInt4(QuantizeOptions(group_size=16)),
        QuantizeInt4(SYMMETRIC),
        QuantizeInt4(QuantizeOptions(group_size="channel")),
        QuantizeInt4(QuantizeOptions(group_size="channel", symmetric=True)),
    ],
)
def test_blocks_run_on_one_kernel_each_and_share_the_table(context, scheme):
    scheme(context)
    result = LowerQuantizedBlocksToOrt()(context)
    assert result.rewrites == result.proved == result.matches == 10
    # The kernel rounds activations to int8; a proof that reports less has not run the real kernel.
    assert 1e-4 < result.max_error < 5e-2
    lookup = nodes(context, "GatherBlockQuantized")[0]
    head = next(n for n in nodes(context, "MatMulNBits") if n.name == "lm_head")
    assert lookup.inputs[0] is head.inputs[1]
    assert not any(name.startswith("qcompile::") and "W" in name for name in op_histogram(context.model))


def zeroed(context):
    """Make one weight all zeros; return the node that multiplies it."""
    node = next(n for n in nodes(context, "MatMul") if n.name == "layers.1.attn.o_proj")
    weight = node.inputs[1]
    weight.const_value = ir.tensor(np.zeros(weight.shape.numpy(), np.float32), name=weight.name)
    return node.name


@pytest.mark.parametrize("scheme", [QuantizeInt8, QuantizeInt4, QuantizeInt8Dynamic])
def test_a_weight_of_zeros_runs_on_the_kernel_too(context, scheme):
    name = zeroed(context)
    scheme()(context)
    results = [LowerQuantizedBlocksToOrt()(context), LowerQuantizedActivationsToOrt()(context)]
    assert sum(result.rewrites for result in results) == 10
    assert max(result.max_error for result in results) < 5e-2
    assert {n.domain for n in context.model.graph if n.name == name} == {"com.microsoft"}


def test_a_wrong_kernel_for_a_weight_of_zeros_is_not_proved(context, monkeypatch):
    name = zeroed(context)
    monkeypatch.setattr(blocks, "_INT8_SIGN", np.uint8(127))
    QuantizeInt8()(context)
    rejected = {r.node: r.reason for r in LowerQuantizedBlocksToOrt()(context).rejected}
    assert rejected[name].startswith("rolled back")


def test_int8_activations_give_the_same_codes(context):
    QuantizeInt8Dynamic()(context)
    result = LowerQuantizedActivationsToOrt()(context)
    assert result.rewrites == result.proved == 6
    assert result.max_error < 1e-6
    # a row is a block of QuantizeLinear: opset 21, and the IR version that came with it
    assert {n.attributes["block_size"].as_int() for n in nodes(context, "QuantizeLinear")} == {64}
    assert context.model.graph.opset_imports[""] == 21
    assert context.model.ir_version >= 10


def test_a_later_opset_stays(context):
    context.model.graph.opset_imports[""] = 23
    QuantizeInt8Dynamic()(context)
    assert LowerQuantizedActivationsToOrt()(context).rewrites == 6
    assert context.model.graph.opset_imports[""] == 23


def test_static_activations(context):
    QuantizeInt8Static(statistics=Seen())(context)
    result = LowerQuantizedActivationsToOrt()(context)
    assert result.rewrites == result.proved == 6
    assert result.max_error < 1e-6
    assert not nodes(context, "ReduceMax")
    assert context.model.graph.opset_imports[""] == 18  # nothing here needs a later one


def biases(context):
    return [n for n in nodes(context, "Add") if n.name.endswith(".bias")]


def test_a_bias_is_added_by_the_product(context):
    QuantizeInt8Static(statistics=Seen())(context)
    outputs = {add.outputs[0].name for add in biases(context)}
    assert len(outputs) == 2
    result = LowerQuantizedActivationsToOrt()(context)
    assert result.rewrites == result.proved == 6
    assert result.max_error < 1e-6
    assert not biases(context)
    products = [n for n in nodes(context, "MatMulIntegerToFloat") if len(n.inputs) == 7]
    assert {n.outputs[0].name for n in products} == outputs
    assert all(n.inputs[5] is None and n.inputs[6].const_value is not None for n in products)


@pytest.mark.parametrize("change", ["a second reader", "no vector", "an input"])
def test_a_bias_that_the_product_cannot_take_stays_an_add(context, change):
    QuantizeInt8Static(statistics=Seen())(context)
    add = biases(context)[0]
    product = add.inputs[0]
    if change == "a second reader":
        tap = ir.node("Tanh", [product])
        tap.outputs[0].name = "tapped"
        context.model.graph.append(tap)
        context.model.graph.outputs.append(tap.outputs[0])
    elif change == "no vector":
        one = ir.tensor(np.ones(1, np.float32), name="one")
        add.replace_input_with(1, ir.Value(name="one", shape=ir.Shape([1]), const_value=one))
        context.model.graph.register_initializer(add.inputs[1])
    else:
        add.replace_input_with(1, product)
    assert LowerQuantizedActivationsToOrt()(context).rewrites == 6
    assert biases(context) == [add]


def test_a_large_bias_hides_no_wrong_product(context, monkeypatch):
    """A bias of 10,000 times the product would make any error of it a small one."""
    QuantizeInt8Static(statistics=Seen())(context)
    for add in biases(context):
        huge = ir.tensor(np.full(add.inputs[1].shape.numpy(), 1e6, np.float32), name=add.inputs[1].name)
        add.inputs[1].const_value = huge
    right = activations.named_constant
    monkeypatch.setattr(
        activations,
        "named_constant",
        lambda graph, name, array: right(graph, name, array - np.uint8(9) if name == "code.128" else array),
    )
    result = LowerQuantizedActivationsToOrt()(context)
    assert result.rewrites == 0
    assert len(biases(context)) == 2


def test_a_wrong_zero_point_is_not_proved(context, monkeypatch):
    monkeypatch.setattr(blocks, "_INT8_SIGN", np.uint8(127))
    QuantizeInt8()(context)
    result = LowerQuantizedBlocksToOrt()(context)
    assert result.rewrites == 0
    assert all(r.reason.startswith("rolled back") for r in result.rejected)
    assert len(nodes(context, "LinearW8")) == 9


def test_nor_is_a_wrong_middle_of_activations(context, monkeypatch):
    right = activations.named_constant

    def wrong(graph, name, array):
        return right(graph, name, array - np.uint8(1) if name == "code.128" else array)

    monkeypatch.setattr(activations, "named_constant", wrong)
    QuantizeInt8Dynamic()(context)
    result = LowerQuantizedActivationsToOrt()(context)
    # 127 instead of 128 clips one code: only the largest magnitudes show it
    assert all(r.reason.startswith("rolled back") for r in result.rejected)
    assert result.rewrites + len(result.rejected) == 6


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize("scheme", ["int8", "int8-weight", "int4"])
def test_on_ort_everything_quantized_runs_quantized(exported, tmp_path, kind, scheme):
    report = optimize_tiny(exported[kind], tmp_path / "out", "fuse", scheme)
    assert report.loaded.dequantized == ()
    assert report.loaded.quantized == 10
    assert report.loaded.private_bytes <= report.loaded.resident_bytes <= report.loaded.peak_bytes
    assert compare_directories(exported[kind], tmp_path / "out", num_tokens=8).mean_kl < (
        0.3 if scheme == "int4" else 0.005
    )


def test_weights_made_float_at_load_are_told(exported, tmp_path):
    report = optimize_tiny(exported["qwen2"], tmp_path / "out", "fuse", "int8", target="portable")
    # The integer products and the lookup survive; what is multiplied after dequantizing was folded to float.
    assert report.loaded.quantized == 5
    parts = {f"layers.{i}.{part}" for i in (0, 1) for part in ("attn.o_proj", "mlp.down_proj")}
    assert set(report.loaded.dequantized) == {*parts, "lm_head"}
    assert any("made float when ONNX Runtime loads" in warning for warning in report.warnings)
    assert inspect_loaded(tmp_path / "out").dequantized == report.loaded.dequantized


def test_bits_can_differ_by_layer(exported, tmp_path):
    layers = (
        LayerOptions("*gate_up*", bits=4, group_size=32, activations="float"),
        LayerOptions("lm_head", group_size=16),
    )
    report = optimize_tiny(exported["qwen2"], tmp_path / "out", "fuse", "int8", quantize=QuantizeOptions(layers=layers))
    assert report.loaded.dequantized == ()
    assert report.loaded.kernels["MatMulNBits"] == 7
    assert report.loaded.kernels["MatMulIntegerToFloat"] == 2


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_whole_channel_is_cut_into_blocks_for_the_kernel(tmp_path, symmetric):
    shape = {"hidden_size": 320, "intermediate_size": 448, "num_attention_heads": 5, "num_key_value_heads": 1}
    source = export_tiny(tmp_path, "qwen2", head_dim=64, **shape)
    options = QuantizeOptions(group_size="channel", symmetric=symmetric)
    report = optimize_tiny(source, tmp_path / "ort", "fuse", "int4", quantize=options)
    assert report.loaded.dequantized == ()
    assert not report.warnings
    optimize_tiny(source, tmp_path / "portable", "fuse", "int4", target="portable", quantize=options, verify="off")
    assert compare_directories(tmp_path / "portable", tmp_path / "ort", num_tokens=8).mean_kl < 0.01


@pytest.mark.parametrize(("width", "block"), [(256, 256), (384, 128), (320, 64), (96, 32), (80, 16)])
def test_a_channel_is_stored_as_one_scale_and_widened_at_load(tmp_path, width, block):
    shape = {"hidden_size": width, "intermediate_size": width, "num_attention_heads": width // 16}
    source = export_tiny(tmp_path, "qwen2", num_key_value_heads=1, head_dim=16, **shape)
    options = QuantizeOptions(group_size="channel")
    report = optimize_tiny(source, tmp_path / "out", "fuse", "int8-weight", quantize=options)
    assert report.loaded.dequantized == ()
    assert report.loaded.quantized == 10
    assert not report.warnings
    assert not {"Expand", "Cast"} & report.loaded.kernels.keys()  # both are folded when the model is loaded
    graph = load_model(tmp_path / "out" / "model.onnx").graph
    products = [n for n in graph if n.op_type == "MatMulNBits"]
    assert {n.attributes["block_size"].as_int() for n in products} == {block}
    scales = [v for name, v in graph.initializers.items() if ".scales" in name]
    assert {v.dtype for v in scales} == {ir.DataType.FLOAT16}
    assert {v.shape[1] for v in scales} == {1}
    optimize_tiny(source, tmp_path / "exact", "fuse", "int8-weight", target="portable", quantize=options, verify="off")
    # activations rounded to 8 bits per block inside the kernel, and nothing else
    assert compare_directories(tmp_path / "exact", tmp_path / "out", num_tokens=8).mean_kl < 0.003


def test_a_block_that_no_kernel_takes_stays_a_function(context):
    QuantizeInt8()(context)
    node = nodes(context, "LinearW8")[0]
    node.attributes["block_size"] = ir.AttrInt64("block_size", 8)
    result = LowerQuantizedBlocksToOrt()(context)
    assert [r.reason for r in result.rejected] == ["MatMulNBits takes blocks of 16, 32, 64, 128, 256, not 8"]
    assert nodes(context, "LinearW8") == [node]


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize("schemes", [("kv8",), ("int8", "kv8")])
def test_an_int8_cache_generates_the_same_text(exported, tmp_path, kind, schemes):
    report = optimize_tiny(exported[kind], tmp_path / "out", "fuse", *schemes)
    summary = report.loaded.summary()
    assert "int8 KV cache in 2 layers, " in summary
    assert ("10 of 10 quantized tensors" in summary) == ("quantized tensors" in summary) == ("int8" in schemes)
    manifest = Manifest.load(tmp_path / "out")
    model = ir.load(tmp_path / "out" / "model.onnx")
    caches = [v for v in (*model.graph.inputs, *model.graph.outputs) if ".key" in v.name or ".value" in v.name]
    assert {v.dtype for v in caches} == {ir.DataType.INT8}
    assert len(caches) == 4 * manifest.model.num_hidden_layers
    assert manifest.graph().io.dtype == "float32"
    assert manifest.quantization["kv_cache"]["bits"] == 8
    agreement = compare_directories(exported[kind], tmp_path / "out", num_tokens=16)
    assert 0 < agreement.mean_kl < 0.005


def test_key_scales_cover_both_channels_of_a_rotated_pair():
    largest = np.array([[1, 2, 30, 4, 5, 6, 7, 80]], np.float32)
    first = np.array([[9, 0, 0, 0, 0, 0, 0, 0]], np.float32)
    scales = cache_scales(KeyValueStatistics(largest, largest, first, first, 4))
    np.testing.assert_allclose(scales.key * 127, [[9, 6, 30, 80, 9, 6, 30, 80]], rtol=1e-6)
    np.testing.assert_allclose(scales.value * 127, [[9, 2, 30, 4, 5, 6, 7, 80]], rtol=1e-6)


def test_a_target_without_an_int8_cache_says_so(exported, tmp_path):
    with pytest.raises(UnsupportedOpError, match="kv8: the target has no int8 KV cache; use --target ort"):
        optimize_tiny(exported["qwen2"], tmp_path / "out", "fuse", "kv8", target="portable")


def test_kv8_alone_refuses_what_is_for_weights(exported, tmp_path):
    for options in (QuantizeOptions(bits=4), QuantizeOptions(quality=0.1, calibration="self")):
        with pytest.raises(PassError, match="kv8 takes --calibration alone, the other options are for weights"):
            optimize_tiny(exported["qwen2"], tmp_path / "out", "fuse", "kv8", quantize=options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", [None, "ort", "portable"])
def test_a_model_with_an_int8_cache_is_not_quantized_again(exported, tmp_path, target):
    optimize_tiny(exported["qwen2"], tmp_path / "kv8", "fuse", "kv8", verify="off")
    for scheme in ("kv8", "int8", "int4"):
        with pytest.raises(
            PassError, match="the model has an int8 KV cache already; quantize the model that it was made from"
        ):
            optimize_tiny(tmp_path / "kv8", tmp_path / "out", scheme, target=target)
    report = optimize_tiny(tmp_path / "kv8", tmp_path / "out", "clean", target=target, verify="off")
    assert report.target == (target or "ort")
