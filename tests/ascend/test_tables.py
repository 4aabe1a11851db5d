"""The tables of chips and operators, and the spelling of shapes: what they promise to the lowering and to ATC."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.ascend.chips import Cann, cann_version, chip_named, chips, known_cann, nearest_cann
from qcompile.ascend.om_reader import OmPort, read_om
from qcompile.ascend.om_writer import OmGraph, OmOp, write_om
from qcompile.ascend.operators import Support, operator_table
from qcompile.ascend.shapes import format_input_shapes, parse_input_shapes
from qcompile.errors import AtcError
from qcompile.target import TARGETS

TABLE = operator_table()
# Kernels by chip family, as CANN 8.1 lists them.
MATRIX = {
    "NPURmsNorm": {"910B": {"f16", "bf16", "f32"}, "310P": {"f16", "f32"}, "310B": set()},
    "NPURotaryMul": {"910B": {"f16", "bf16", "f32"}, "310P": {"f16", "f32"}, "310B": set()},
    "NPURotaryPositionEmbedding": {"910B": {"f16", "bf16", "f32"}, "310P": set(), "310B": set()},
    "NPUPromptFlashAttention": {"910B": {"f16", "bf16"}, "310P": {"f16"}, "310B": set()},
    "NPUDynamicQuant": {"910B": {"f16", "bf16"}, "310P": set(), "310B": set()},
    "NPUAscendQuantV2": {"910B": {"f16", "bf16", "f32"}, "310P": {"f16", "f32"}, "310B": set()},
    "NPUWeightQuantBatchMatmulV2": {"910B": {"f16", "bf16"}, "310P": {"f16"}, "310B": set()},
    "AscendQuant": {"910B": {"f16", "f32"}, "310P": {"f16", "f32"}, "310B": {"f16", "f32"}},
    "AscendDequant": {"910B": {"f16"}, "310P": {"f16"}, "310B": {"f16"}},
}
FAMILIES = {"910B": "910b4", "310P": "310p3", "310B": "310b4"}


@pytest.mark.parametrize("name", MATRIX)
def test_kernels_by_chip(name):
    operator = TABLE.get(name)
    assert operator is not None
    assert {family: set(operator.floats_on(chip_named(chip))) for family, chip in FAMILIES.items()} == MATRIX[name]


def test_what_the_lowering_asks():
    norm, quant = TABLE.get("NPURmsNorm"), TABLE.get("QuantBatchMatMul")
    assert norm is not None
    assert quant is not None
    chip, edge = chip_named("910b4"), chip_named("310b4")
    assert norm.runs_on(chip, "f16", Cann(8, 1))
    assert not norm.runs_on(edge, "f16", Cann(8, 1))
    assert not norm.runs_on(chip, "f64", Cann(8, 1))
    assert not norm.runs_on(chip, "f16", Cann(8, 1), opset=19)
    assert norm.runs_on(chip, "f16", Cann(8, 1), opset=1, domain="npu")
    assert quant.runs_on(chip, "f16", Cann(8, 5), opset=16)
    assert not quant.runs_on(chip, "f16", Cann(8, 5), opset=17)
    assert quant.support(Cann(8, 1)) is Support.LIKELY
    assert quant.support(Cann(8, 5)) is Support.CERTAIN


def test_unusable_operators_are_never_offered():
    for name in ("NPUIncreFlashAttention", "NPUFlashAttention"):
        operator = TABLE.get(name)
        assert operator is not None
        assert operator.avoid
        assert not operator.runs_on(chip_named("910b4"), "f16", Cann(9, 2))


def test_the_table_is_consistent():
    assert len(list(TABLE)) > 250
    for operator in TABLE:
        assert operator.registrations, operator.name
        assert operator.likely <= operator.certain, operator.name
        for registration in operator.registrations.values():
            assert registration.first <= registration.last, operator.name
            assert all(registration.first < v < registration.last for v in registration.missing), operator.name
        if operator.is_detailed:
            assert operator.inputs, operator.name
            optional = [port.is_optional for port in operator.inputs]
            assert optional == sorted(optional), f"{operator.name}: optional inputs come last"
    assert not set(TABLE.absent) & {operator.name for operator in TABLE}
    assert all(TABLE.absent.values())


@pytest.mark.parametrize(
    "name", ["MatMul", "Add", "Softmax", "Reshape", "Gather", "ArgMax", "TopK", "Where", "If", "Constant"]
)
def test_standard_operators_are_parsed_at_opset_16(name):
    operator = TABLE.get(name)
    assert operator is not None
    assert operator.registrations[""].holds(16)


def test_every_chip_is_a_target():
    names = {name for name in TARGETS if name.startswith("ascend")}
    assert {"ascend910b1", "ascend910b2", "ascend910b3", "ascend910b4", "ascend310p3", "ascend310b4"} <= names
    assert names <= set(chips())


@pytest.mark.parametrize("spelling", ["910B4", "ascend910b4", "Ascend910B4", " Ascend 910B4 ", "ascend_910b4"])
def test_spellings_of_a_chip(spelling):
    assert chip_named(spelling).name == "Ascend910B4"


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 40), st.integers(0, 40))
def test_every_release_has_rules(major, minor):
    nearest, warning = nearest_cann(Cann(major, minor))
    assert nearest in known_cann()
    assert (warning is None) == (nearest == Cann(major, minor))


@pytest.mark.parametrize(
    ("text", "version"), [("8.1.RC1", (8, 1)), ("9.0.1", (9, 0)), ("V8.5", (8, 5)), ("8.1.RC1.alpha002", (8, 1))]
)
def test_spellings_of_a_release(text, version):
    assert cann_version(text) == Cann(*version)


SHAPES = st.dictionaries(
    st.text("abcxyz_.:/0123456789", min_size=1, max_size=12),
    st.lists(st.one_of(st.none(), st.integers(1, 10**8)), max_size=5).map(tuple),
    max_size=5,
)


@settings(deadline=None, max_examples=40)
@given(SHAPES)
def test_shapes_survive_the_command_line(shapes):
    assert parse_input_shapes(format_input_shapes(shapes)) == shapes


@pytest.mark.parametrize("text", ["x", "x:a", ":1,2", "x:1,,2", "x:0", "x:-2", "x:1;x:2", "x:1~", "x:99999999999"])
def test_shapes_that_are_none(text):
    with pytest.raises(AtcError):
        parse_input_shapes(text)


PORTS = st.builds(
    OmPort,
    st.text(min_size=1, max_size=20).filter(lambda name: name.isprintable()),
    st.sampled_from(["f32", "f16", "bf16", "i64", "i8", "bool"]),
    st.lists(st.integers(-1, 2**40), max_size=6).map(tuple),
    st.sampled_from(["ND", "NCHW", "FRACTAL_NZ"]),
)


@settings(deadline=None, max_examples=40)
@given(st.lists(PORTS, min_size=1, max_size=4, unique_by=lambda port: port.name), st.binary(max_size=200))
def test_what_is_written_is_read(tmp_path_factory, ports, weights):
    path = tmp_path_factory.mktemp("om") / "m.om"
    data = [OmOp("Data", p.name, outputs=(p,), attributes={"index": i}) for i, p in enumerate(ports)]
    end = OmOp("NetOutput", "Node_Output", tuple(f"{p.name}:0" for p in ports), tuple(ports))
    write_om(path, "model", [OmGraph("g", (*data, end))], platform_version="t", weights=weights)
    (model,) = read_om(path).models
    assert list(model.inputs) == [p for p in ports if p.name != "ascend_mbatch_shape_data"]
    assert [(p.dtype, p.shape, p.layout) for p in model.outputs] == [(p.dtype, p.shape, p.layout) for p in ports]
    assert model.weight_bytes == len(weights)
