"""The cases on which graphs are studied: what they cover, and that their inputs are what a decoder really gets."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.analysis import Analysis
from qcompile.cases import CASES, LONG_DECODE, LONG_PREFILL, Case, DimBinding, cases_for, input_array, input_shape


def value(name, *dims, dtype=ir.DataType.INT64):
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(dims))


def decoder(
    batch="batch_size", length="sequence_length", past="past_sequence_length", total="total_sequence_length", cache=True
):
    inputs = [
        value("input_ids", batch, length),
        value("attention_mask", batch, total),
        value("position_ids", batch, length),
    ]
    if cache:
        inputs += [
            value(f"past_key_values.0.{kind}", batch, 2, past, 8, dtype=ir.DataType.FLOAT) for kind in ("key", "value")
        ]
    return ir.Graph(inputs, [], nodes=[], opset_imports={"": 18}, name="decoder")


def described(case):
    return {
        "prefill": case.past_length == 0 and case.sequence_length > 1,
        "decode with past": case.past_length > 0 and case.sequence_length == 1,
        "chunk after a past": case.past_length > 0 and case.sequence_length > 1,
        "batch of different lengths": case.batch_size > 1 and case.lengths is not None and len(set(case.lengths)) > 1,
        "decode of a ragged batch": case.batch_size > 1 and case.sequence_length == 1 and case.lengths is not None,
        "ragged batch, first chunk": case.batch_size > 1 and case.past_length == 0 and case.lengths is not None,
        "long past": case.past_length >= 131072,
        "tiny activations": case.magnitude < 1e-3,
        "large activations": case.magnitude > 1,
        "padding among the new tokens": not case.query_is_token().all(),
    }


@pytest.mark.parametrize("situation", list(described(CASES[0])))
def test_every_situation_is_covered(situation):
    assert any(described(case)[situation] for case in cases_for(decoder()))


def test_all_but_the_long_case_are_proved():
    cases = cases_for(decoder())
    assert [case.is_proved for case in cases] == [True] * len(CASES) + [False]
    assert cases[-1] == LONG_DECODE


def test_a_graph_without_a_cache_gets_a_long_prompt_and_no_past():
    cases = cases_for(decoder(cache=False))
    assert all(case.past_length == 0 for case in cases)
    assert cases[-1] == LONG_PREFILL
    assert any(case.batch_size > 1 and case.lengths is not None for case in cases)


def test_dimensions_that_are_equal_everywhere_are_equal_by_construction():
    cases = [case for case in cases_for(decoder()) if case.is_proved]
    sizes = {
        "B": [c.batch_size for c in cases],
        "S": [c.sequence_length for c in cases],
        "P": [c.past_length for c in cases],
        "T": [c.total_length for c in cases],
    }
    assert len({tuple(numbers) for numbers in sizes.values()}) == 4


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_masks_and_positions_are_those_of_a_padded_batch(case):
    lengths = case.lengths or (case.total_length,) * case.batch_size
    for row, length in enumerate(lengths):
        padding = case.total_length - length
        mask = [0] * padding + [1] * length
        assert case.attention_mask()[row].tolist() == mask
        positions = [max(column - padding, 0) for column in range(case.total_length)]
        assert case.position_ids()[row].tolist() == positions[case.past_length :]
        for query in range(case.sequence_length):
            seen = [bool(mask[key]) and key <= case.past_length + query for key in range(case.total_length)]
            assert case.causal_mask()[row, query].tolist() == seen
            assert case.query_is_token()[row, query] == bool(mask[case.past_length + query])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_row_has_a_token_and_every_token_sees_itself(case):
    assert (case.attention_mask().sum(1) > 0).all()
    itself = case.causal_mask()[:, np.arange(case.sequence_length), case.past_length + np.arange(case.sequence_length)]
    assert (itself == case.query_is_token()).all()


@pytest.mark.parametrize(
    ("fixed", "wanted"),
    [
        ({"batch": 1}, lambda c: c.batch_size == 1),
        ({"length": 1}, lambda c: c.sequence_length == 1),
        ({"past": 24}, lambda c: c.past_length == 24),
        (
            {"length": 1, "past": 7, "total": 8},
            lambda c: (c.sequence_length, c.past_length, c.total_length) == (1, 7, 8),
        ),
        ({"length": 4, "total": 32}, lambda c: (c.sequence_length, c.total_length) == (4, 32)),
        (
            {"batch": 2, "length": 3, "past": 5, "total": 8},
            lambda c: (c.batch_size, c.sequence_length, c.past_length) == (2, 3, 5),
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_fixed_dimensions_are_kept(fixed, wanted):
    cases = cases_for(decoder(**fixed))
    assert cases
    assert all(wanted(case) for case in cases)
    assert len({(c.batch_size, c.sequence_length, c.past_length, c.lengths, c.magnitude) for c in cases}) == len(cases)
    for case in cases:
        assert case.attention_mask().shape == (case.batch_size, case.total_length)
        assert (case.attention_mask().sum(1) > 0).all()


def test_inputs_of_every_case_have_the_declared_shapes():
    graph = decoder()
    for case in cases_for(graph):
        dims = DimBinding(case)
        shapes = {v.name: input_shape(v, case, dims) for v in graph.inputs}
        assert shapes["input_ids"] == (case.batch_size, case.sequence_length)
        assert shapes["past_key_values.0.key"] == (case.batch_size, 2, case.past_length, 8)
        assert input_array(graph.inputs[1], case, shapes["attention_mask"]).shape == (
            case.batch_size,
            case.total_length,
        )
        assert input_array(graph.inputs[0], case, shapes["input_ids"]) is None


def test_names_of_other_dims_say_what_they_are():
    case = Case("case", 3, 5, 11)
    dims = DimBinding(case)
    bound = {
        name: dims.bind(ir.SymbolicDim(name))
        for name in ("batch", "seq_len", "past_len", "past + seq", "image", "audio")
    }
    assert [bound[name] for name in ("batch", "seq_len", "past_len", "past + seq")] == [3, 5, 11, 16]
    assert len(set(bound.values())) == len(bound)
    assert dims.bind(ir.SymbolicDim("image")) == bound["image"]


def test_a_second_name_for_a_length_is_another_length():
    dims = DimBinding(Case("case", 3, 5, 11))
    assert dims.bind(ir.SymbolicDim("source_seq")) == 5
    assert dims.bind(ir.SymbolicDim("target_seq")) != 5
    assert dims.bind(ir.SymbolicDim("source_seq")) == 5


def test_unnamed_dims_are_each_their_own():
    graph = ir.Graph([value("a", None, None), value("b", None)], [], nodes=[], opset_imports={"": 18}, name="g")
    analysis = Analysis(ir.Model(graph, ir_version=10))
    shapes = [spec.shape for v in graph.inputs for spec in (analysis.specs(v) or [])[:1]]
    assert len({size for shape in shapes for size in shape}) == 3


def test_a_past_of_any_rank_is_a_past():
    graph = ir.Graph([value("state", "batch_size", "past_length", 8)], [], nodes=[], opset_imports={"": 18}, name="g")
    assert any(case.past_length > 0 for case in cases_for(graph))
