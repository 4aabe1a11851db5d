"""Checkpoints that were quantized before keep their codes: what is stored, what runs, what is refused."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.artifact import load_model
from qcompile.errors import PassError, QuantError, UnsupportedOpError
from qcompile.export.export_checkpoint import export_checkpoint
from qcompile.passes import grid_weights
from qcompile.passes.base import PassContext, op_histogram
from qcompile.passes.change import finish_rewrites
from qcompile.passes.grid_weights import _nibbles, _rest, _unsigned
from qcompile.passes.lower_quantized_blocks_to_ort import LowerQuantizedBlocksToOrt
from qcompile.passes.packed_codes import computed_tensor, shifted, unpacked, zero_points
from qcompile.passes.quantize_lossless import QuantizeLossless
from qcompile.quant.packing import packed_pairs
from qcompile.quantize_options import QuantizeOptions
from qcompile.quantized_functions import BLOCKED_LINEARS
from qcompile.verify import compare_directories
from tests.optimized import export_changed, export_tiny, optimize_tiny
from tests.quant.ggml_weights import dequantized
from tests.quantize.functions import call
from tests.tiny_checkpoints import random_tensors, tiny_config, write_safetensors, write_tiny_checkpoint

# As a Q4_K_M file mixes them: a packed QKV with rows of two formats, offsets, nested scales, and what is in blocks of 32.
MIXED = {
    "embed_tokens": Type.Q8_0,
    "q_proj": Type.Q4_K,
    "k_proj": Type.Q4_K,
    "v_proj": Type.Q6_K,
    "o_proj": Type.Q5_0,
    "gate_proj": Type.Q5_0,
    "up_proj": Type.Q5_K,
    "layers.0.mlp.down_proj": Type.Q4_K,
    "layers.1.mlp.down_proj": Type.Q6_K,
    "lm_head": Type.Q5_K,
}
WIDE = {"hidden_size": 256, "intermediate_size": 512}


def on_grids(tensors, formats=MIXED):
    """Round the matrices of a checkpoint to formats, by parts of their names."""
    for seed, (name, array) in enumerate(tensors.items()):
        kind = next((kind for part, kind in formats.items() if part in name), None)
        if array.ndim == 2 and kind is not None:
            grid = dequantized(kind, array.shape, seed)
            # a power of two moves no weight off its grid
            tensors[name] = grid * np.float32(2.0 ** np.round(np.log2(array.std() / grid.std())))


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return export_changed(tmp_path_factory.mktemp("tied"), on_grids, **WIDE)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    directory = tmp_path_factory.mktemp("untied")
    shape = {**WIDE, "head_dim": 64}
    checkpoint = write_tiny_checkpoint(directory / "checkpoint", "qwen3", **shape)
    tensors = random_tensors(tiny_config("qwen3", **shape))
    on_grids(tensors, {**MIXED, "embed_tokens": Type.Q4_K})
    write_safetensors(checkpoint / "model.safetensors", tensors, "float32")
    export_checkpoint(str(checkpoint), directory / "exported")
    return directory / "exported"


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_the_stored_codes_are_the_model(kind, request, tmp_path):
    source = request.getfixturevalue(kind)
    report = optimize_tiny(source, tmp_path / "exact", "fuse", "lossless", target="portable")
    result = next(r for r in report.results if r.name == "lossless")
    assert result.rewrites == result.matches == 10
    assert not [w for w in report.warnings if "stay float" in w]
    # sums in another order, and offsets that are added apart
    assert compare_directories(source, tmp_path / "exact", num_tokens=16).max_logit_difference < 2e-3


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_it_runs_on_the_kernels_of_onnx_runtime(kind, request, tmp_path):
    source = request.getfixturevalue(kind)
    report = optimize_tiny(source, tmp_path / "out", "fuse", "lossless")
    assert report.loaded.dequantized == ()
    assert report.loaded.quantized == 10
    # nothing is unpacked while it runs
    assert not {"BitShift", "BitwiseAnd", "BitwiseOr"} & report.loaded.kernels.keys()
    # activations are rounded to 8 bits inside the kernels, and nothing else is; blocks of random bytes have means other than 0,
    # so that counts for more than usual: int8-weight has 0.0043 for the tied one
    assert compare_directories(source, tmp_path / "out", num_tokens=16).mean_kl < 0.02
    ops = op_histogram(load_model(tmp_path / "out" / "model.onnx"))
    assert ops["com.microsoft::MatMulNBits"] == 9
    assert not any(name.startswith("qcompile::") for name in ops)


def operands(context):
    """What the kernels read, [codes, scales, zero points] by the node's name: computed by ONNX Runtime from what is stored."""
    model = context.model
    kernels = {n.name: [v for v in n.inputs[1:] if v is not None] for n in model.graph if n.op_type == "MatMulNBits"}
    wanted = dict.fromkeys(value for values in kernels.values() for value in values)
    model.graph.outputs[:] = list(wanted)
    model.graph.inputs.clear()
    finish_rewrites(context)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    arrays = dict(zip(wanted, session.run(None, {}), strict=True))
    return {name: [arrays[value] for value in values] for name, values in kernels.items()}


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_kernels_get_every_code_scale_and_zero_point_that_is_stored(kind, request, tmp_path):
    context = fused(request.getfixturevalue(kind), tmp_path)
    QuantizeLossless()(context)
    linears = [n for n in context.model.graph if n.op_type in BLOCKED_LINEARS]
    wanted = {n.name: [computed_tensor(v).numpy() for v in n.inputs[1:]] for n in linears}
    LowerQuantizedBlocksToOrt()(context)
    seen = operands(context)
    assert seen.keys() == wanted.keys()
    assert {n.op_type for n in linears} == {"LinearW8", "LinearW4Asymmetric"}
    for name, (codes, *others) in wanted.items():
        flat = seen[name][0].reshape(len(codes), -1)
        np.testing.assert_array_equal(flat, codes if codes.dtype == np.uint8 else codes.view(np.uint8) ^ np.uint8(128))
        for array, other in zip(seen[name][1:], others, strict=True):
            np.testing.assert_array_equal(array, other)


def test_a_portable_model_can_be_lowered_later(tied, tmp_path):
    optimize_tiny(tied, tmp_path / "portable", "fuse", "lossless", target="portable", verify="off")
    report = optimize_tiny(tmp_path / "portable", tmp_path / "later", "fuse", target="ort")
    optimize_tiny(tied, tmp_path / "once", "fuse", "lossless")
    assert report.loaded.quantized == 10
    assert compare_directories(tmp_path / "once", tmp_path / "later", num_tokens=8).max_logit_difference < 1e-4


def test_bytes_are_about_those_of_the_formats(tied, tmp_path):
    report = optimize_tiny(tied, tmp_path / "out", "fuse", "lossless", target="portable")
    model = load_model(tmp_path / "out" / "model.onnx")
    stored = sum(v.const_value.nbytes for v in model.graph.initializers.values())
    layer = 256 * 256 * (4.625 + 8) / 8 + 2 * 128 * 256 * 5.7 / 8 + 2 * 512 * 256 * 5.7 / 8 + 512 * 256 * 6.0 / 8
    assert stored < 1.1 * (512 * 256 * 8.5 / 8 + 2 * layer) + 40_000
    assert report.size_bytes < 4 * stored


def test_a_tied_table_stays_one_tensor(tied, tmp_path):
    optimize_tiny(tied, tmp_path / "out", "fuse", "lossless")
    model = load_model(tmp_path / "out" / "model.onnx")
    lookup = next(n for n in model.graph if n.op_type == "GatherBlockQuantized")
    head = next(n for n in model.graph if n.op_type == "MatMulNBits" and n.name == "lm_head")
    assert lookup.inputs[0] is head.inputs[1]


def fused(source, directory):
    optimize_tiny(source, directory / "fused", target="portable")
    return PassContext(load_model(directory / "fused" / "model.onnx"))


def test_codes_do_not_depend_on_how_the_weight_is_cut(tied, tmp_path, monkeypatch):
    whole = fused(tied, tmp_path)
    cut = PassContext(load_model(tmp_path / "fused" / "model.onnx"))
    QuantizeLossless()(whole)
    monkeypatch.setattr(grid_weights, "_PIECE_ELEMENTS", 16 * 512)
    QuantizeLossless()(cut)
    assert whole.model.graph.initializers.keys() == cut.model.graph.initializers.keys()
    for name, value in whole.model.graph.initializers.items():
        np.testing.assert_array_equal(value.const_value.numpy(), cut.model.graph.initializers[name].const_value.numpy())


def test_what_is_computed_from_stored_codes_is_the_weight(tied, tmp_path):
    context = fused(tied, tmp_path)
    node = next(n for n in context.model.graph if n.name == "layers.1.mlp.down_proj")
    weight = node.inputs[1].const_value.numpy().T
    QuantizeLossless()(context)
    linear = next(n for n in context.model.graph if n.name == "layers.1.mlp.down_proj")
    codes, scales = (computed_tensor(v).numpy() for v in linear.inputs[1:])
    np.testing.assert_allclose(codes * np.repeat(scales, 16, axis=1), weight, rtol=2.0**-22)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([4, 5, 6]), st.integers(1, 5), st.sampled_from([16, 48, 64]), st.integers(0, 2**32))
def test_codes_are_packed_and_unpacked(bits, num_rows, width, seed):
    half = 1 << (bits - 1)
    codes = np.random.default_rng(seed).integers(-half, half, (num_rows, width)).astype(np.int8)
    unsigned = _unsigned(codes, bits)
    stored = {"nibbles": _nibbles(unsigned), **({"rest": _rest(unsigned, bits - 4)} if bits > 4 else {})}
    np.testing.assert_array_equal(unpacked(*stored.values(), bits=bits), codes)
    packed = call(f"UnpackInt{bits}", stored, result=np.int8)
    np.testing.assert_array_equal(packed, codes)


def test_codes_beside_a_large_weight_are_small(tied, tmp_path):
    """The kernel's error of x is multiplied by scales * codes: with zero points those are about the weights, offsets apart."""
    context = fused(tied, tmp_path)
    sources = {n.name: n.inputs[1].const_value.numpy() for n in context.model.graph if n.name.endswith("gate_up_proj")}
    QuantizeLossless()(context)
    for node in context.model.graph:
        if node.name in sources:
            codes, scales = (computed_tensor(v).numpy() for v in node.inputs[1:])
            block = codes.shape[1] // scales.shape[1]
            weight = sources[node.name].T.reshape(-1, block)
            offsets = codes.reshape(-1, block) * scales.reshape(-1, 1) - weight
            # an offset is minus the value of one of the codes, the one nearest to 0
            assert (np.abs(offsets) <= np.abs(weight).min(axis=1, keepdims=True) + 1e-6).all()
            assert np.abs(offsets).max() > 0


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 7), st.sampled_from([15, 31]), st.integers(0, 2**32))
def test_zero_points_are_the_codes_nearest_to_0(num_rows, num_blocks, largest, seed):
    random = np.random.default_rng(seed)
    scales = random.uniform(0.001, 0.1, (num_rows, num_blocks)).astype(np.float32)
    scales[:, 0] = 0  # blocks of one value
    minima = (random.uniform(-0.2, 1.2 * largest, scales.shape) * np.maximum(scales, 0.01)).astype(np.float32)
    z = call("ZeroPoints", {"scales": scales, "minima": minima}, largest=largest)
    grid = scales[..., None] * np.arange(largest + 1) - minima[..., None]
    near = np.abs(np.take_along_axis(grid, z[..., None].astype(int), axis=2))[..., 0]
    np.testing.assert_allclose(near, np.abs(grid).min(axis=2), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(zero_points(scales, minima, largest), z)
    codes = random.integers(-largest // 2, largest // 2 + 1, (num_rows, 16 * num_blocks)).astype(np.int8)
    moved = call("ShiftCodes", {"codes": codes, "z": z}, result=np.int8, middle=(largest + 1) // 2)
    np.testing.assert_array_equal(moved, codes + (largest + 1) // 2 - np.repeat(z, 16, axis=1).astype(int))
    np.testing.assert_array_equal(shifted(codes, z, (largest + 1) // 2), moved)
    few = np.minimum(z, 15)
    packed = call("PackInt4", {"z": few}, result=np.uint8)
    both = np.stack([packed & 15, packed >> 4], axis=2).reshape(num_rows, -1)
    np.testing.assert_array_equal(both[:, :num_blocks], few)
    np.testing.assert_array_equal(packed_pairs(few), packed)


def test_a_weight_off_its_grid_stays_float_and_is_named(tmp_path):
    def change(tensors):
        on_grids(tensors)
        tensors["model.layers.0.self_attn.o_proj.weight"][3, 5] += 0.001

    source = export_changed(tmp_path, change, **WIDE)
    report = optimize_tiny(source, tmp_path / "out", "fuse", "lossless", target="portable")
    told = next(w for w in report.warnings if "stay float" in w)
    assert "1 of 10 weights stay float, such as 'layers.0.attn.o_proj': rows 0 to 15 lie on no grid" in told


def test_zero_blocks_and_widths_of_16_are_kept(tmp_path):
    def change(tensors):
        for name, array in tensors.items():
            if array.ndim == 2:
                codes = np.random.default_rng(len(name)).integers(-8, 8, array.shape)
                codes[: len(codes) // 2, :16] = 0
                codes[:, 16] = -8
                tensors[name] = (codes * 0.0117).astype(np.float32)

    source = export_changed(tmp_path, change, hidden_size=80, intermediate_size=112, num_attention_heads=10)
    report = optimize_tiny(source, tmp_path / "out", "fuse", "lossless", target="portable")
    assert not [w for w in report.warnings if "stay float" in w]
    assert compare_directories(source, tmp_path / "out", num_tokens=16).max_logit_difference < 2e-3


def test_a_float_model_is_refused(exported, tmp_path):
    with pytest.raises(QuantError, match=r"no weight was quantized before: .* lie on no grid .* --passes int8 or int4"):
        optimize_tiny(exported["qwen2"], tmp_path / "out", "fuse", "lossless")


def test_half_precision_weights_are_refused(tmp_path):
    source = export_tiny(tmp_path, "qwen2", dtype="fp16")
    with pytest.raises(QuantError, match=r"it is float16: .* export with --dtype fp32"):
        optimize_tiny(source, tmp_path / "out", "fuse", "lossless", target="portable")


def test_nan_is_refused(tied, tmp_path):
    context = fused(tied, tmp_path)
    node = next(n for n in context.model.graph if n.name == "layers.0.attn.o_proj")
    weight = node.inputs[1].const_value.numpy().copy()
    weight[2, 3] = np.nan
    node.inputs[1].const_value = ir.tensor(weight, name=node.inputs[1].name)
    with pytest.raises(QuantError, match="row 3 has NaN or infinite weights"):
        QuantizeLossless()(context)


def test_a_layer_can_be_kept_float(tied, tmp_path):
    options = QuantizeOptions(keep_float=("*down_proj",))
    report = optimize_tiny(tied, tmp_path / "out", "fuse", "lossless", target="portable", quantize=options)
    assert next(r for r in report.results if r.name == "lossless").rewrites == 8


@pytest.mark.parametrize(
    ("passes", "options", "error", "told"),
    [
        (("lossless", "int4"), {}, PassError, "int4 changes weights: name one of them"),
        (("lossless", "rotate-residual"), {}, PassError, "rotate-residual changes weights"),
        (("lossless",), {"quantize": QuantizeOptions(bits=4)}, PassError, "lossless takes --keep-float alone"),
        (("lossless",), {"target": "ascend910b4"}, UnsupportedOpError, "use --target ort or portable"),
    ],
)
def test_what_does_not_go_together_is_refused(tied, tmp_path, passes, options, error, told):
    with pytest.raises(error, match=told):
        optimize_tiny(tied, tmp_path / "out", "fuse", *passes, **options)


def test_symmetric_rows_beside_rows_with_offsets_run_as_4_bits(tmp_path):
    """Q4_0 rows in a packed QKV of Q4_K: their zero points are 8 and their offsets 0."""
    formats = {**MIXED, "v_proj": Type.Q4_0, "k_proj": Type.Q4_1}
    source = export_changed(tmp_path, lambda tensors: on_grids(tensors, formats), **WIDE)
    report = optimize_tiny(source, tmp_path / "exact", "fuse", "lossless", target="portable")
    quantized = next(r for r in report.results if r.name == "lossless").detail["quantized"]
    assert {w["operator"] for w in quantized if "qkv" in w["name"]} == {"LinearW4Asymmetric"}
    assert compare_directories(source, tmp_path / "exact", num_tokens=16).max_logit_difference < 2e-3
    optimize_tiny(source, tmp_path / "out", "fuse", "lossless")
    assert compare_directories(source, tmp_path / "out", num_tokens=16).mean_kl < 0.02
