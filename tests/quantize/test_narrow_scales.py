"""Scales in half precision: the same numbers in half the bytes, exact or refused."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from qcompile.errors import QuantError
from qcompile.passes.clean import EliminateDeadCode
from qcompile.passes.lower_quantized_activations_to_ort import LowerQuantizedActivationsToOrt
from qcompile.passes.lower_quantized_blocks_to_ort import LowerQuantizedBlocksToOrt
from qcompile.passes.narrow_scales import NarrowScales
from qcompile.passes.quantize_int4 import QuantizeInt4
from qcompile.passes.quantize_int8 import QuantizeInt8, QuantizeInt8Dynamic
from qcompile.tensors import NarrowableTensor


def scales_of(context):
    return [v for name, v in context.model.graph.initializers.items() if ".scales" in name]


def run(context):
    session = onnxruntime.InferenceSession(ir.to_proto(context.model).SerializeToString())
    feeds = {}
    for value in session.get_inputs():
        shape = [{"batch_size": 1, "sequence_length": 3, "total_sequence_length": 3}.get(d, d) for d in value.shape]
        shape = [0 if isinstance(d, str) else d for d in shape]
        dtype = np.int64 if value.type == "tensor(int64)" else np.float32
        feeds[value.name] = np.ones(shape, dtype)
    return session.run(["logits"], feeds)[0]


@pytest.mark.parametrize("scheme", [QuantizeInt4, QuantizeInt8])
def test_half_the_bytes_and_the_same_numbers(context, scheme):
    scheme()(context)
    LowerQuantizedBlocksToOrt()(context)
    before, wide = run(context), sum(v.const_value.nbytes for v in scales_of(context))
    result = NarrowScales()(context)
    assert result.rewrites == result.matches == 9  # the tied table and head share one
    assert {v.dtype for v in scales_of(context)} == {ir.DataType.FLOAT16}
    assert sum(v.const_value.nbytes for v in scales_of(context)) == wide // 2
    assert np.array_equal(run(context), before)


def test_a_second_run_finds_nothing(context):
    QuantizeInt4()(context)
    NarrowScales()(context)
    assert NarrowScales()(context).matches == 0


def test_what_was_narrowed_is_widened_before_it_is_lowered(context):
    QuantizeInt4()(context)
    NarrowScales()(context)
    result = LowerQuantizedBlocksToOrt()(context)
    assert result.rewrites == result.proved == 10
    assert NarrowScales()(context).rewrites == 9


def test_nothing_hangs_loose(context):
    QuantizeInt4()(context)
    NarrowScales()(context)
    assert EliminateDeadCode()(context).rewrites == 0


def test_a_float_model_has_none(context):
    assert NarrowScales()(context).matches == 0


def test_scales_of_whole_rows_are_narrowed_too(context):
    QuantizeInt8Dynamic()(context)
    LowerQuantizedBlocksToOrt()(context)
    LowerQuantizedActivationsToOrt()(context)
    before = run(context)
    assert NarrowScales()(context).rewrites == len(scales_of(context)) == 9
    assert {len(v.shape) for v in scales_of(context)} == {1, 2}
    assert {v.dtype for v in scales_of(context)} == {ir.DataType.FLOAT16}
    assert np.array_equal(run(context), before)


def vector(context, name, numbers):
    """Add a vector to the last hidden state through an Add before the head; return its name."""
    graph = context.model.graph
    head = next(n for n in graph if n.name == "lm_head")
    tensor = ir.tensor(numbers, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    graph.register_initializer(value)
    total = ir.node("ReduceSum", [value], {"keepdims": 0})
    added = ir.node("Add", [head.inputs[0], total.outputs[0]])
    graph.insert_before(head, [total, added])
    head.replace_input_with(0, added.outputs[0])


def test_a_vector_of_float16_numbers_goes_along_and_others_stay(context):
    QuantizeInt4()(context)
    LowerQuantizedBlocksToOrt()(context)
    exact = np.linspace(-200, 200, 600).astype(np.float16).astype(np.float32)
    for name, numbers in (("long", exact), ("short", exact[:100]), ("inexact", exact + np.float32(1e-3))):
        vector(context, name, numbers)
    vector(context, "large", exact * np.float32(1000))
    vector(context, "nan", np.where(exact > 0, np.nan, exact).astype(np.float32))
    before = run(context)
    assert NarrowScales()(context).rewrites == 10
    names = set(context.model.graph.initializers)
    assert "long.float16" in names
    assert {"short", "inexact", "large", "nan"} <= names
    assert np.array_equal(run(context), before, equal_nan=True)


def test_vectors_of_a_float_model_stay(context):
    vector(context, "long", np.ones(600, np.float32))
    assert NarrowScales()(context).rewrites == 0


def test_numbers_that_do_not_fit_are_refused_by_name(context):
    QuantizeInt4()(context)
    value = next(v for v in scales_of(context) if isinstance(v.const_value, NarrowableTensor))
    tensor = value.const_value
    wrong = NarrowableTensor(
        lambda start, stop: tensor.rows(start, stop) * np.float32(1.0001),
        tensor.dtype,
        tensor.shape,
        tensor.exact_in,
        name=tensor.name,
    )
    value.const_value = wrong
    NarrowScales()(context)
    narrow = context.model.graph.initializers[f"{value.name}.float16"].const_value
    with pytest.raises(QuantError, match=f"{value.name}: its scales are no FLOAT16 numbers"):
        narrow.numpy()
