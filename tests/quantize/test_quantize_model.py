"""What the quantization passes make of a tiny decoder, and what they refuse."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.errors import PassError, QuantError
from qcompile.passes import quantize_model, quantize_weights
from qcompile.passes.base import op_histogram
from qcompile.passes.narrow_scales import NarrowScales
from qcompile.passes.quantize_int4 import QuantizeInt4
from qcompile.passes.quantize_int8 import QuantizeInt8, QuantizeInt8Dynamic, QuantizeInt8Static
from qcompile.passes.quantize_projections import find_projections
from qcompile.quant.algorithms import quantize_weight
from qcompile.quant.rtn import round_to_nearest
from qcompile.quant.scheme import InputStatistics, WeightScheme
from qcompile.quantize_options import LayerOptions, QuantizeOptions
from qcompile.verify import compare_directories
from tests.optimized import optimize_tiny

DOWN_FLOAT = LayerOptions("*down_proj*", activations="dynamic", group_size="channel")


def nodes(context, op_type):
    return [n for n in context.model.graph if n.op_type == op_type]


def constants(node):
    return [v for v in node.inputs if v is not None and v.const_value is not None]


class Seen:
    """Statistics of inputs that all reach 2."""

    def __init__(self):
        self.prepared = 0

    def prepare(self, model):
        self.prepared += 1

    def __call__(self, projection):
        size = projection.num_inputs
        hessian = np.eye(size, dtype=np.float32)
        return InputStatistics(8, np.full(size, 2, np.float32), np.ones(size, np.float32), hessian)

    def record(self):
        return {"source": "made up"}


@pytest.mark.parametrize(
    ("scheme", "counts"),
    [
        (QuantizeInt8, {"LinearW8": 9, "EmbeddingW8": 1}),
        (QuantizeInt8Dynamic, {"LinearW8A8": 6, "LinearW8": 3, "EmbeddingW8": 1}),
        (QuantizeInt4, {"LinearW4Asymmetric": 9, "EmbeddingW4Asymmetric": 1}),
    ],
)
def test_every_projection_is_quantized(context, scheme, counts):
    result = scheme()(context)
    ops = op_histogram(context.model)
    assert {name: ops.get(f"qcompile::{name}", 0) for name in counts} == counts
    assert result.matches == result.rewrites == 10
    assert len(result.detail["quantized"]) == 10
    assert not nodes(context, "Linear")
    assert not nodes(context, "MatMul")


@pytest.mark.parametrize("scheme", [QuantizeInt8, QuantizeInt8Dynamic, QuantizeInt4])
def test_a_tied_table_is_stored_once_and_not_in_float(context, scheme):
    scheme()(context)
    lookup = next(n for n in context.model.graph if n.op_type.startswith("Embedding"))
    head = next(n for n in context.model.graph if n.name == "lm_head")
    assert constants(lookup) == constants(head)
    vocabulary = head.inputs[1].const_value.shape[0]
    floats = [v for v in context.model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT]
    assert not any(v.shape[0] == vocabulary and v.const_value.size > vocabulary * 8 for v in floats)


def test_an_untied_table_has_codes_of_its_own(untied):
    QuantizeInt8()(untied)
    lookup = nodes(untied, "EmbeddingW8")[0]
    head = next(n for n in untied.model.graph if n.name == "lm_head")
    assert constants(lookup)[0] is not constants(head)[0]


def test_codes_are_those_of_the_quantizer_however_they_are_cut(context, monkeypatch):
    linear = nodes(context, "Linear")[0]
    weight = linear.inputs[1]
    scheme = WeightScheme(4, 32, symmetric=False, scale_type="float16")
    wanted = quantize_weight(np.ascontiguousarray(weight.const_value.numpy().T), scheme, "mse")
    monkeypatch.setattr(quantize_weights, "_PIECE_ELEMENTS", 7 * wanted.codes.shape[1])
    QuantizeInt4()(context)
    values = {
        name: context.model.graph.initializers[f"{weight.name}.{name}"].const_value for name in ("codes", "scales")
    }
    pieces = [piece() for _, piece in values["codes"].pieces()]
    assert len(pieces) > 2
    packed = np.concatenate(pieces)
    assert np.array_equal(packed & 15, wanted.codes[:, ::2])
    assert np.array_equal(packed >> 4, wanted.codes[:, 1::2])
    assert np.array_equal(values["scales"].numpy(), wanted.scales)


def test_int4_has_groups_twice_as_long_in_the_tied_table_and_covering_scales_in_down_proj(context):
    seen = {
        (t["group_size"], t["algorithm"]): t["operator"]
        for t in QuantizeInt4()(context).detail["quantized"]
        if t["name"] in {"lm_head", "embed_tokens"} or "down_proj" in t["name"] or "qkv" in t["name"]
    }
    assert seen == {
        (64, "mse"): "EmbeddingW4Asymmetric",
        (32, "rtn"): "LinearW4Asymmetric",
        (32, "mse"): "LinearW4Asymmetric",
    }


def test_what_is_asked_for_ends_the_groups_and_algorithms_of_int4(context):
    done = QuantizeInt4(QuantizeOptions(group_size=16, algorithm="rtn"))(context).detail["quantized"]
    assert {(t["group_size"], t["algorithm"]) for t in done} == {(16, "rtn")}


def test_codes_by_inputs_are_the_transposed_codes(context):
    weight = nodes(context, "Linear")[0].inputs[1]
    wanted = round_to_nearest(np.ascontiguousarray(weight.const_value.numpy().T), WeightScheme(8, scale_type="float16"))
    QuantizeInt8Dynamic()(context)
    graph = context.model.graph
    codes = graph.initializers[f"{weight.name}.codes"].const_value
    assert np.array_equal(codes.numpy(), wanted.codes.T)
    assert np.array_equal(codes.columns(3, 9), wanted.codes[3:9])
    assert np.array_equal(graph.initializers[f"{weight.name}.scales"].const_value.numpy(), wanted.scales[:, 0])


def test_static_activations_take_their_step_from_calibration(context):
    seen = Seen()
    result = QuantizeInt8Static(statistics=seen)(context)
    assert seen.prepared == 1
    assert result.detail["calibration"] == {"source": "made up"}
    steps = [float(n.inputs[3].const_value.numpy()) for n in nodes(context, "LinearW8A8Static")]
    assert steps == pytest.approx([2 / 127] * 6)


def test_an_algorithm_that_needs_calibration_gets_it_and_a_lookup_does_without(untied):
    seen = Seen()
    QuantizeInt4(QuantizeOptions(algorithm="gptq"), seen)(untied)
    assert seen.prepared == 1
    assert nodes(untied, "EmbeddingW4Asymmetric")


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        (QuantizeInt8Static, QuantizeOptions(), "static activations needs calibration data"),
        (QuantizeInt4, QuantizeOptions(algorithm="gptq"), "gptq needs calibration data"),
        (QuantizeInt4, QuantizeOptions(algorithm="magic"), "algorithm = 'magic'"),
        (QuantizeInt4, QuantizeOptions(bits=3), "bits = 3"),
        (QuantizeInt4, QuantizeOptions(group_size=48), "group_size = 48: wanted one of 16, 32"),
        (QuantizeInt4, QuantizeOptions(group_size=64), "does not divide its 160 inputs; give one of 16, 32, channel"),
        (QuantizeInt4, QuantizeOptions(activations="dynamic"), "int8 activations take weights of bits = 8"),
        (QuantizeInt8, QuantizeOptions(symmetric=False), "8-bit weights are symmetric"),
        (QuantizeInt8Dynamic, QuantizeOptions(group_size=32), "int8 activations take .* not bits = 8, group_size = 32"),
        (QuantizeInt8, QuantizeOptions(keep_float=("*nowhere*",)), r"no layer is called '\*nowhere\*'"),
        (QuantizeInt8, QuantizeOptions(layers=(LayerOptions("lmhead", bits=4),)), "no layer is called 'lmhead'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(context, scheme, options, message):
    before = op_histogram(context.model)
    with pytest.raises(QuantError, match=message) as caught:
        scheme(options)(context)
    assert "\n" not in str(caught.value)
    assert op_histogram(context.model) == before


def test_a_quantized_model_is_not_quantized_again(context):
    QuantizeInt8()(context)
    with pytest.raises(QuantError, match="already quantized: node 'embed_tokens' is EmbeddingW8"):
        QuantizeInt4()(context)


def test_nor_is_one_that_was_lowered(exported, tmp_path):
    optimize_tiny(exported["qwen2"], tmp_path / "once", "fuse", "int8-weight")
    with pytest.raises(QuantError, match=r"already quantized: node .* is MatMulNBits"):
        optimize_tiny(tmp_path / "once", tmp_path / "twice", "int4")
    assert not (tmp_path / "twice").exists()


def test_two_schemes_or_options_without_one_are_refused(exported, tmp_path):
    with pytest.raises(PassError, match="names int8-weight and int4"):
        optimize_tiny(exported["qwen2"], tmp_path / "out", "int8-weight", "int4")
    with pytest.raises(PassError, match="no quantization pass"):
        optimize_tiny(exported["qwen2"], tmp_path / "out", "fuse", quantize=QuantizeOptions(bits=4))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("scheme", ["int8", "int8-weight", "int4"])
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_written(exported, tmp_path, scheme, bad):
    source = tmp_path / "broken"
    optimize_tiny(exported["qwen2"], source, "clean", target="portable")
    data = np.memmap(source / "model.onnx.data", np.float32, "r+")
    model = ir.load(source / "model.onnx")
    name = next(n for n in model.graph.initializers if n.endswith("layers.1.mlp.down_proj.weight"))
    data[model.graph.initializers[name].const_value.offset // 4 + 5] = bad
    data.flush()
    with pytest.raises(QuantError, match=r"layers\.1\.mlp\.down_proj.*NaN or infinite"):
        optimize_tiny(source, tmp_path / "out", "fuse", scheme, verify="off")
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


def test_blocks_and_channels_of_zeros_stay_zero(context):
    weight = nodes(context, "Linear")[0].inputs[1]
    array = weight.const_value.numpy().copy()
    array[:32] = 0
    array[:, 3] = 0
    weight.const_value = ir.tensor(array, name=weight.name)
    QuantizeInt8(QuantizeOptions(group_size=32))(context)
    scales = context.model.graph.initializers[f"{weight.name}.scales"].const_value.numpy()
    codes = context.model.graph.initializers[f"{weight.name}.codes"].const_value.numpy()
    assert np.isfinite(scales).all()
    assert (scales > 0).all()
    assert (codes[:, :32] == 0).all()
    assert (codes[3] == 0).all()


@pytest.mark.parametrize("factor", [2.0**-18, 1e-9, 2e8])
@pytest.mark.parametrize("scheme", [QuantizeInt8, QuantizeInt8Dynamic, QuantizeInt4])
def test_weights_whose_scales_are_no_half_precision_numbers_have_wide_ones(context, scheme, factor):
    weight = nodes(context, "Linear")[0].inputs[1]
    array = weight.const_value.numpy() * np.float32(factor)
    weight.const_value = ir.tensor(array, name=weight.name)
    scheme()(context)
    scales = context.model.graph.initializers[f"{weight.name}.scales"].const_value
    assert 0.2 < scales.numpy().max() * (7.5 if scheme is QuantizeInt4 else 127) / np.abs(array).max() < 2.2
    assert NarrowScales()(context).rewrites == 8
    assert context.model.graph.initializers[f"{weight.name}.scales"].dtype == ir.DataType.FLOAT


def test_layers_stay_float_when_asked(context):
    result = QuantizeInt8(QuantizeOptions(keep_float=("layers.0.*",)))(context)
    assert result.rewrites == 6
    assert {r.reason for r in result.rejected} == {"kept float, as asked"}


def test_a_float_head_keeps_its_tied_embedding_float(context):
    result = QuantizeInt8(QuantizeOptions(keep_float=("lm_head",)))(context)
    assert not nodes(context, "EmbeddingW8")
    assert "tied to an output head that stays float" in {r.reason for r in result.rejected}


def test_inputs_that_no_block_divides_take_smaller_blocks(context, untied):
    result = QuantizeInt8()(context)
    blocks = {tensor["name"]: tensor["group_size"] for tensor in result.detail["quantized"]}
    assert blocks["layers.0.attn.o_proj"] == 32
    assert blocks["layers.0.mlp.down_proj"] == blocks["lm_head"] == blocks["embed_tokens"] == 16
    result = QuantizeInt8Dynamic()(untied)
    blocks = {tensor["name"]: tensor["group_size"] for tensor in result.detail["quantized"]}
    assert blocks["lm_head"] == 64
    assert blocks["layers.0.mlp.down_proj"] == 32


def test_the_last_layer_entry_wins_value_by_value(context):
    layers = (LayerOptions("*o_proj*", bits=4, group_size=32), LayerOptions("layers.0.*", group_size=16))
    result = QuantizeInt8(QuantizeOptions(layers=layers))(context)
    seen = {t["name"]: (t["bits"], t["group_size"]) for t in result.detail["quantized"]}
    assert seen["layers.0.attn.o_proj"] == (4, 16)
    assert seen["layers.1.attn.o_proj"] == (4, 32)
    assert seen["layers.0.attn.qkv_proj"] == (8, 16)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize(("scheme", "most"), [("int8", 0.005), ("int8-weight", 0.005), ("int4", 0.3)])
def test_the_quantized_graph_runs_anywhere_and_agrees(exported, tmp_path, kind, scheme, most):
    optimize_tiny(exported[kind], tmp_path / "out", "fuse", scheme, target="portable", verify="off")
    agreement = compare_directories(exported[kind], tmp_path / "out", num_tokens=8)
    assert 0 < agreement.mean_kl < most


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_models_quantize(tmp_path, dtype):
    from tests.optimized import export_tiny

    source = export_tiny(tmp_path, "qwen2", dtype)
    target = "ort" if dtype == "fp16" else "portable"
    report = optimize_tiny(source, tmp_path / "out", "fuse", "int8", target=target)
    assert not [w for w in report.warnings if "rolled back" in w]
    if dtype == "fp16":
        assert compare_directories(source, tmp_path / "out", num_tokens=8).mean_kl < 0.01


def test_gptq_rounds_a_tied_table_for_both_of_its_uses(context, untied):
    """With the head's second moments alone, the rows that are looked up would lose more than rounding to nearest does."""
    errors = {}
    for name, own in (("tied", context), ("untied", untied)):
        head = next(p for p in find_projections(own.model.graph) if "lm_head" in p.names)
        table = head.rows(0, head.num_outputs)
        moments = np.diag(np.geomspace(1, 1e-4, head.num_inputs).astype(np.float32))
        moments += 0.3 * np.sqrt(np.outer(np.diag(moments), np.diag(moments)))
        seen = InputStatistics(8, np.ones(head.num_inputs, np.float32), np.ones(head.num_inputs, np.float32), moments)
        codes = quantize_weight(
            table, WeightScheme(4, 32, symmetric=False), "gptq", seen, options=quantize_model._options_of(head, "gptq")
        )
        errors[name] = float(((codes.dequantize() - table) ** 2).sum() / (table**2).sum())
    assert errors["tied"] < errors["untied"]
