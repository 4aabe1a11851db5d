"""One decoder written in ways that no exporter of ours writes it: fused all the same, or unharmed with a reason."""

import numpy as np
import onnx
import pytest

from qcompile.artifact import load_model
from qcompile.pipeline import OptimizeOptions, optimize
from qcompile.verify import compare_directories
from tests.robustness.edits import (
    CALLS,
    FUSED,
    assert_unharmed,
    counts,
    feeds_for,
    fixed,
    fuse,
    in_front,
    inputs,
    nodes_of,
    output,
    run,
)


def no_dims(proto: onnx.ModelProto) -> None:
    for _, _, dim in inputs(proto):
        dim.ClearField("dim_param")


def odd_dims(proto: onnx.ModelProto) -> None:
    for name, axis, dim in inputs(proto):
        if dim.dim_param:
            dim.dim_param = f"{name}.{axis}"


def minus_one(proto: onnx.ModelProto) -> None:
    for _, _, dim in inputs(proto):
        if dim.dim_param:
            dim.dim_value = -1


def no_output_shapes(proto: onnx.ModelProto) -> None:
    del proto.graph.value_info[:]
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")


def one_name(proto: onnx.ModelProto) -> None:
    for each in proto.graph.node:
        each.name = "same"


def no_names(proto: onnx.ModelProto) -> None:
    for each in proto.graph.node:
        each.name = ""


def backwards(proto: onnx.ModelProto) -> None:
    nodes = list(proto.graph.node)[::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def weights_as_inputs(proto: onnx.ModelProto) -> None:
    for tensor in proto.graph.initializer:
        info = output(tensor.name, tensor.data_type)
        info.type.tensor_type.shape.dim.extend(onnx.TensorShapeProto.Dimension(dim_value=n) for n in tensor.dims)
        proto.graph.input.append(info)


def old_ir_version(proto: onnx.ModelProto) -> None:
    weights_as_inputs(proto)
    proto.ir_version = 3


def long_domain(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].domain = "ai.onnx"
    for each in proto.graph.node:
        each.domain = "ai.onnx"


@pytest.mark.parametrize(
    "edit",
    [no_dims, odd_dims, no_output_shapes, no_names, long_domain, weights_as_inputs],
    ids=lambda edit: edit.__name__,
)
def test_what_is_written_differently_is_fused_all_the_same(edited, edit):
    path = edited(edit)
    assert counts(fuse(path, strict=True)) == FUSED
    feeds = {call: feeds_for(path, *call) for call in CALLS}
    for call in CALLS:
        assert set(feeds[call]) >= {"input_ids", "attention_mask", "position_ids"}
    assert_unharmed(path)


@pytest.mark.parametrize("edit", [one_name, backwards, minus_one, old_ir_version], ids=lambda edit: edit.__name__)
def test_what_a_runtime_refuses_is_mended(exported, edited, edit, tmp_path):
    assert counts(fuse(edited(edit), strict=True)) == FUSED
    fixed = optimize(exported, tmp_path / "wanted", OptimizeOptions(target="portable"))
    assert counts(fixed) == FUSED
    feeds = feeds_for(exported / "model.onnx", *CALLS[1])
    wanted, seen = (run(tmp_path / name / "model.onnx", feeds) for name in ("wanted", "out"))
    np.testing.assert_array_equal(wanted["logits"], seen["logits"])


def test_weights_that_were_inputs_are_none_afterwards(edited, tmp_path):
    fuse(edited(weights_as_inputs))
    model = load_model(tmp_path / "out" / "model.onnx")
    assert len(model.graph.inputs) == 7
    assert not {v.name for v in model.graph.inputs} & set(model.graph.initializers)


def without_shapes(proto: onnx.ModelProto) -> None:
    for value in proto.graph.input:
        value.type.tensor_type.ClearField("shape")


def test_without_input_shapes_nothing_is_fused_and_everything_said(edited):
    path = edited(without_shapes)
    report = fuse(path)
    assert counts(report)["fuse-attention"] == 0
    assert any("fuse-attention: 0 of 2 places" in warning for warning in report.warnings)
    assert_unharmed(path)


def without_cache(proto: onnx.ModelProto) -> None:
    graph = proto.graph
    caches = {v.name for v in graph.input if v.name.startswith("past_key_values.")}
    for name in caches:
        graph.input.remove(next(v for v in graph.input if v.name == name))
    for each in graph.node:
        if caches & set(each.input):
            each.op_type, each.input[:] = "Identity", each.input[1:]
            del each.attribute[:]
    del graph.output[1:]


def without_mask(proto: onnx.ModelProto) -> None:
    graph = proto.graph
    graph.input.remove(next(v for v in graph.input if v.name == "attention_mask"))
    ones = (
        "b = Shape <start = 0, end = 1> (input_ids) s = Shape <start = 1, end = 2> (input_ids) "
        "p = Shape <start = 2, end = 3> (CACHE) t = Add (s, p) bt = Concat <axis = 0> (b, t) "
        "one = Constant <value_int = 1> () attention_mask = Expand (one, bt)"
    )
    nodes = [*nodes_of(ones, CACHE="past_key_values.0.key"), *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def test_without_a_cache_all_but_attention_is_fused(edited):
    path = edited(without_cache)
    report = fuse(path)
    assert counts(report) == FUSED | {"fuse-attention": 0, "fuse-qkv": 0}
    assert_unharmed(path, CALLS[:1])


@pytest.mark.parametrize("target", ["portable", "ort"])
def test_without_a_mask_attention_says_what_it_misses(edited, target):
    path = edited(without_mask)
    report = fuse(path, target)
    reasons = {r.reason for result in report.results for r in result.rejected if result.name == "fuse-attention"}
    assert reasons == {"the graph has no input attention_mask [B, T] of integers"}
    if target == "portable":
        assert_unharmed(path)


@pytest.mark.parametrize(
    ("edit", "call"),
    [
        (fixed(length=3, past=4), (2, 3, 4)),
        (fixed(batch=2), (2, 3, 4)),
        (fixed(1, 1, 7), (1, 1, 7)),
        (fixed(batch=600), (600, 1, 2)),
    ],
    ids=["only the batch is free", "the batch is fixed", "everything is fixed", "many rows"],
)
def test_fixed_dimensions(edited, edit, call):
    path = edited(edit)
    assert counts(fuse(path, strict=True)) == FUSED
    assert_unharmed(path, (call,))


def narrow_ids(proto: onnx.ModelProto) -> None:
    names = ("input_ids", "attention_mask", "position_ids")
    for name in names:
        in_front(f"{name}_64 = Cast <to = 7> ({name})", name, f"{name}_64")(proto)
    for value in proto.graph.input:
        if value.name in names:
            value.type.tensor_type.elem_type = onnx.TensorProto.INT32


def test_int32_ids(edited):
    path = edited(narrow_ids)
    assert counts(fuse(path, strict=True)) == FUSED
    assert_unharmed(path)


def test_int32_ids_on_the_kernels(exported, edited, tmp_path):
    report = fuse(edited(narrow_ids), "ort", strict=True)
    lowered = next(r for r in report.results if r.name == "lower-attention-to-ort")
    assert lowered.detail["rotary"] == "inside the kernel, by tables"
    agreement = compare_directories(exported, tmp_path / "out", num_tokens=8)
    assert agreement.same_tokens == agreement.num_tokens


def test_weights_in_several_files(exported, tmp_path):
    proto = onnx.load(exported / "model.onnx")
    path = tmp_path / "in" / "model.onnx"
    path.parent.mkdir()
    for index, tensor in enumerate(t for t in proto.graph.initializer if len(t.raw_data) > 500):
        data = path.parent / f"part{index % 3}.bin"
        offset = data.stat().st_size if data.exists() else 0
        with data.open("ab") as stream:
            stream.write(tensor.raw_data)
        entries = {"location": data.name, "offset": offset, "length": len(tensor.raw_data)}
        tensor.external_data.extend(onnx.StringStringEntryProto(key=k, value=str(v)) for k, v in entries.items())
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.ClearField("raw_data")
    onnx.save(proto, path)
    assert fuse(path).count("fuse-attention") == 2
    assert sorted(p.name for p in (tmp_path / "out").glob("model*")) == ["model.onnx", "model.onnx.data"]
    assert_unharmed(path)
