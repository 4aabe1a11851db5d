"""`qcompile check`: every seeded fault is found, clean graphs give no finding, odd files are refused in one line."""

import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from qcompile.ascend.chips import cann_version, chip_named, chips
from qcompile.ascend.legality.check import check_model
from qcompile.ascend.legality.finding import Effect
from qcompile.cli.check import command
from qcompile.errors import AtcError, GraphError
from tests.ascend.faults import Fault, attribute, changed, input_dim
from tests.ascend.faults_model import MODEL_FAULTS
from tests.ascend.faults_nodes import NODE_FAULTS
from tests.ascend.faults_operands import OPERAND_FAULTS
from tests.ascend.faults_quant import QUANT_FAULTS
from tests.ascend.graphs import (
    CLEAN,
    ascend_quant,
    attention_layer,
    constants,
    flash_attention,
    norm_model,
    parsed,
    saved,
)

FAULTS = [*MODEL_FAULTS, *NODE_FAULTS, *OPERAND_FAULTS, *QUANT_FAULTS]


def report_on(path, chip="910b4", cann="8.1", options=None):
    return check_model(path, chip_named(chip), cann_version(cann), options)


@pytest.mark.parametrize("cann", ["8.1", "8.5", "9.1"])
@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_graph_gives_no_finding(name, cann, tmp_path):
    report = report_on(saved(CLEAN[name](), tmp_path), cann=cann)
    assert report.findings == ()
    assert report.is_legal


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_seeded_fault_is_found(fault: Fault, tmp_path):
    report = report_on(saved(fault.build(), tmp_path), fault.chip, fault.cann, fault.options)
    found = [f for f in report.findings if f.rule == fault.rule]
    assert found, [f.rule for f in report.findings]
    assert found[0].code == fault.code
    assert all((found[0].seen, found[0].wanted, found[0].cure))
    assert report.is_legal == (not any(f.effect is not Effect.SLOW for f in report.findings))


def test_there_are_enough_kinds_of_faults():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 30
    assert len({fault.rule for fault in FAULTS}) >= 50


def test_no_fault_is_found_where_there_is_none(tmp_path):
    """Standard operators on every chip that has them: nothing is invented."""
    model = parsed("a = Sigmoid (x) b = Mul (x, a) y = MatMul (b, w)", values="float16[1,8,64] a, float16[1,8,64] b")
    path = saved(constants(model, w=np.ones((64, 64), np.float16)), tmp_path)
    for name in chips():
        assert report_on(path, name).findings == (), name


@pytest.mark.parametrize("sizes", [(8, 64), (0, 0, 64), (-1,), (0, -1), (512, 1), (2, -1, 4)])
def test_a_reshape_of_as_many_elements_is_none(sizes, tmp_path):
    model = parsed("y = Reshape (x, shape)", outputs="float16[rows,columns] y")
    report = report_on(saved(constants(model, shape=np.array(sizes, np.int64)), tmp_path))
    assert "reshape-count" not in [finding.rule for finding in report.findings]


def test_what_is_said_of_sizes_order_and_destination(tmp_path):
    seen = {}
    for fault in FAULTS:
        if fault.rule in {"reshape-count", "node-order", "quant-dst-type"}:
            report = report_on(saved(fault.build(), tmp_path), fault.chip, fault.cann, fault.options)
            seen[fault.name] = [(f.node, f.seen, f.certain) for f in report.findings if f.rule == fault.rule]
    assert seen["Reshape to fewer elements"] == [("Reshape_0", "[1,8,64] as [8,32]: 512 elements as 256", True)]
    assert seen["nodes before what they read"] == [
        ("Relu_0", "the input 'b', made by 'Mul_1' further down", False),
        ("Mul_1", "the input 'a', made by 'Sigmoid_2' further down", False),
    ]
    assert [certain for _, _, certain in seen["16-bit activations"]] == [True]
    assert [certain for _, _, certain in seen["4-bit activations on 310P"]] == [False]


def test_4_bit_activations_are_what_the_910b_has(tmp_path):
    model = changed(ascend_quant, attribute("AscendQuant", dst_type="INT4"))()
    rules = [finding.rule for finding in report_on(saved(model, tmp_path)).findings]
    assert "quant-dst-type" not in rules


@pytest.mark.parametrize(("bytes_there", "is_found"), [(128, False), (200, False), (127, True)])
def test_external_weights_without_a_length(bytes_there, is_found, tmp_path):
    """Weights may share a file: more than needed is no fault, less is."""
    model = norm_model()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w")
    (tmp_path / "w").write_bytes(bytes(bytes_there))
    rules = [f.rule for f in report_on(saved(model, tmp_path)).findings]
    assert ("weight-size" in rules) == is_found


def test_a_finding_names_node_layer_and_code(tmp_path):
    model = norm_model()
    model.graph.node[0].name = "model/layers.3/input_layernorm/norm"
    node = model.graph.node[0]
    node.op_type = "NPUSwiGlu"
    finding = next(f for f in report_on(saved(model, tmp_path)).findings if f.rule == "op-unregistered")
    assert finding.node == "model/layers.3/input_layernorm/norm"
    assert finding.layer.startswith("layers.3") or "layers.3" in finding.layer
    assert "Sigmoid" in finding.cure


def test_every_node_is_reported(tmp_path):
    body = " ".join(f"v{i} = Gelu (v{i - 1})" for i in range(1, 6)).replace("v0", "x").replace("v5", "y", 1)
    report = report_on(saved(parsed(body), tmp_path))
    assert [f.rule for f in report.findings if f.rule == "op-unregistered"] == ["op-unregistered"] * 5


def test_a_subgraph_is_searched(tmp_path):
    body = """
        y = If <then_branch = yes () => (float16[1,8,64] a) { a = Gelu (x) },
                else_branch = no () => (float16[1,8,64] b) { b = Identity (x) }> (c)
    """
    report = report_on(saved(parsed(body, "float16[1,8,64] x, bool c"), tmp_path))
    assert [f.op for f in report.findings if f.rule == "op-unregistered"] == ["Gelu"]


def test_shapes_given_on_the_command_line_close_dimensions(tmp_path):
    path = saved(changed(norm_model, input_dim(1, "sequence"))(), tmp_path)
    run = CliRunner().invoke(command, [str(path), "--target", "ascend910b4", "--input-shape", "x:1,8,64"])
    assert run.exit_code == 0, run.output
    run = CliRunner().invoke(command, [str(path), "--target", "ascend910b4", "--json"])
    assert run.exit_code == 1
    record = json.loads(run.stdout)
    assert not record["legal"]
    assert record["graphs"][0]["findings"][0]["code"] == "E10011"
    assert record["graphs"][0]["findings"][0]["effect"] == "refused"


def test_the_table_of_findings(tmp_path):
    model = changed(attention_layer, lambda m: m.opset_import.add(domain="npu", version=1))()
    run = CliRunner().invoke(command, [str(saved(model, tmp_path)), "--target", "910B4", "--cann", "8.1.RC1"])
    assert run.exit_code == 1
    assert "E16005 refused opset-import-several" in run.output
    assert "cure:" in run.output
    assert "Ascend910B4, CANN 8.1" in run.output


@pytest.mark.parametrize(
    ("version", "words"),
    [("7.0", "older than the tables"), ("12.3", "newer than the tables"), ("8.3", "rules of 8.1")],
)
def test_an_unknown_release_warns_and_uses_the_nearest(version, words, tmp_path):
    report = report_on(saved(norm_model(), tmp_path), cann=version)
    assert any(words in warning for warning in report.warnings)
    assert report.findings == ()


def test_attention_without_a_mask_is_a_warning(tmp_path):
    report = report_on(saved(flash_attention("q, k, v"), tmp_path))
    assert report.findings == ()
    assert any("without a mask" in warning for warning in report.warnings)


def test_operators_that_are_only_likely_are_named(tmp_path):
    report = report_on(saved(CLEAN["dynamic w8a8"](), tmp_path), cann="8.1")
    assert any("NPUDynamicQuant" in warning and "likely" in warning for warning in report.warnings)
    assert report_on(saved(CLEAN["dynamic w8a8"](), tmp_path), cann="8.5").warnings == ()


@pytest.mark.parametrize(
    ("name", "words"),
    [("Ascend910B5", "did you mean"), ("ascend910b", "first-generation"), ("snt9b", "Ascend910B4"), ("x", "known are")],
)
def test_an_unknown_chip_gets_a_suggestion(name, words):
    with pytest.raises(AtcError, match=words):
        chip_named(name)


@pytest.mark.parametrize("text", ["", "eight", "8", "8.1.2.3 beta!", "-8.1"])
def test_a_version_that_is_none(text):
    with pytest.raises(AtcError, match="not a CANN version"):
        cann_version(text)


def external(directory, location="weights.bin", length=None):
    model = norm_model()
    tensor = model.graph.initializer[0]
    raw = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": str(length or len(raw))}.items():
        tensor.external_data.add(key=key, value=value)
    return saved(model, directory), raw


def test_external_data_is_read_in_place(tmp_path):
    path, raw = external(tmp_path)
    (tmp_path / "weights.bin").write_bytes(raw)
    assert report_on(path).findings == ()
    (tmp_path / "weights.bin").write_bytes(np.full(64, np.inf, np.float16).tobytes())
    assert [f.rule for f in report_on(path).findings] == ["infinite-constant"]


def test_missing_external_data_is_one_line(tmp_path):
    path, raw = external(tmp_path)
    with pytest.raises(GraphError, match="is missing; copy it"):
        report_on(path)
    (tmp_path / "weights.bin").write_bytes(raw[:10])
    with pytest.raises(GraphError, match="truncated"):
        report_on(path)


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/hostname"])
def test_external_data_stays_inside(location, tmp_path):
    path, _ = external(tmp_path, location)
    with pytest.raises(GraphError, match="own directory"):
        report_on(path)


def test_a_file_above_2_gib_is_found_without_reading_its_weights(tmp_path):
    """A sparse file: an initializer that claims 2.1 GB inline, as a model saved without external data has."""
    head, tail = norm_model(), onnx.ModelProto()
    head.graph.ClearField("initializer")
    tail.graph.initializer.add(name="gamma", dims=[64], data_type=10, raw_data=b"")
    size = 2_200_000_000
    tensor = onnx.TensorProto(name="big", dims=[size], data_type=3).SerializeToString()
    tensor += bytes([9 << 3 | 2]) + varint(size)
    graph = head.graph.SerializeToString() + b"\x2a" + varint(len(tensor) + size) + tensor
    head.ClearField("graph")
    path = tmp_path / "big.onnx"
    with path.open("wb") as stream:
        stream.write(head.SerializeToString() + b"\x3a" + varint(len(graph) + size) + graph)
        stream.seek(size, 1)
        stream.truncate()
    rules = [f.rule for f in report_on(path).findings]
    assert "file-too-large" in rules


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


@pytest.mark.parametrize(
    "content", [b"", b"not a model at all", b"\x08\x08", b"\x3a\xff\xff\xff\xff\xff\xff", b"\xff" * 400]
)
def test_a_file_that_is_no_model(content, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    if content == b"\x08\x08":  # a message of a few bytes: a model without a graph
        assert not report_on(path).is_legal
        return
    with pytest.raises(GraphError, match="not an ONNX model"):
        report_on(path)


def test_a_truncated_model_is_refused_or_reported(tmp_path):
    whole = attention_layer().SerializeToString()
    path = tmp_path / "m.onnx"
    for cut in range(1, len(whole), 997):
        path.write_bytes(whole[:cut])
        try:
            assert not report_on(path).is_legal
        except GraphError:
            continue


def test_the_file_name_is_checked(tmp_path):
    report = report_on(saved(norm_model(), tmp_path, "my model(1).onnx"))
    assert [(f.rule, f.code) for f in report.findings] == [("file-name", "E10001")]
