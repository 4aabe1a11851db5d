"""Failure logs of ATC: each mapped to code, meaning, node, layer and cure."""

from pathlib import Path

import onnx
import pytest

from qcompile.ascend.atc_errors import AtcRunError, explain_failure, known_codes, log_tail
from qcompile.ascend.legality.onnx_file import read_onnx
from qcompile.ascend.legality.view import GraphView
from tests.ascend.graphs import saved

LOGS = Path(__file__).parents[1] / "data" / "atc_logs"
# log -> exit code, code, words of the meaning, node, words of the cure
EXPECTED = {
    "E16002": (255, "E16002", "no ONNX parser", "layers.3.mlp.act", "qcompile check"),
    "E19010": (255, "E19010", "no ONNX parser", "layers.3.mlp.act", "qcompile check"),
    "E16005": (255, "E16005", "several opset_import", "", "opset 16"),
    "E10011": (255, "E10011", "not a positive number", "", "buckets"),
    "E10016": (255, "E10016", "not in the model", "input_idx", "inputs"),
    "E10007": (255, "E10007", "required parameter", "", "--framework=5"),
    "E10054": (255, "E10054", "required parameter is empty", "", "npu-smi"),
    "E10009": (255, "E10009", "exclude each other", "", "keep one"),
    "E10001_soc": (255, "E10001", "not accepted", "", "read the reason"),
    "E10501": (1, "E10501", "not installed", "layers.0.input_norm", "operator package"),
    "E11010": (1, "E11010", "could not read", "layers.1.attn.qkv_split", "qcompile check"),
    "E13023": (1, "E13023", "4 GiB", "", "--external_weight=1"),
    "E14001": (1, "E14001", "contradict", "layers.2.mlp.down_proj", "shapes and types"),
    "E20001": (255, "E20001", "compiler of an operator", "/model/layers.30/self_attn/Slice", "negative axes"),
    "EZ3002": (255, "EZ3002", "types and formats", "layers.5.attn.o_proj.dequant", "value_info"),
    "EZ3003": (255, "EZ3003", "no kernel for this operator", "layers.0.input_norm", "kernel package"),
    "EZ9999": (255, "EZ9999", "inner error of an AI-core", "layers.4.attn.rotary", "limits"),
    "EB0000": (255, "EB0000", "kernel generator", "layers.7.mlp.gate_up", "shapes"),
    "EC0010": (255, "EC0010", "Python package", "", "pip install decorator"),
    "E40001": (255, "E40001", "Python environment", "", "pip install sympy"),
    "E19999": (255, "E19999", "inner error", "", "--log=debug"),
    "generic_then_specific": (255, "EZ3003", "no kernel for this operator", "layers.1.mlp.swiglu", "kernel package"),
    "oom_bad_alloc": (134, "OOM", "out of memory", "", "TE_PARALLEL_COMPILER=1"),
    "oom_killed": (-9, "OOM", "out of memory", "", "MAX_COMPILE_CORE_NUMBER=1"),
    "disk_full": (255, "", "disk is full", "", "free space"),
    "no_devlib": (127, "", "driver's library", "", "devlib"),
    "only_warning": (255, "", "no error code", "", "--log=debug"),
}


@pytest.fixture(scope="module")
def view(tmp_path_factory):
    """A graph whose nodes the logs name."""
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 16]> g (float[1] x) => (float[1] y) { y = Relu (x) }'
    )
    names = {node: "Relu" for _, _, _, node, _ in EXPECTED.values() if node}
    names["layers.3.mlp.act"] = "NPUSwiGlu"
    for name, op in names.items():
        model.graph.node.add(name=name, op_type=op, input=["x"], output=[f"out {name}"])
    return GraphView(read_onnx(saved(model, tmp_path_factory.mktemp("g"))))


def test_every_log_has_an_expectation():
    assert {path.stem for path in LOGS.glob("*.log")} == set(EXPECTED)
    assert len({code for _, code, *_ in EXPECTED.values() if code.startswith("E")}) >= 15


@pytest.mark.parametrize("name", EXPECTED)
def test_a_log_is_explained(name, view):
    returncode, code, meaning, node, cure = EXPECTED[name]
    text = (LOGS / f"{name}.log").read_text(encoding="utf-8")
    failure = explain_failure(text, returncode, view)
    assert failure.code == code
    assert meaning in failure.meaning
    assert cure in failure.cure
    if not node.startswith("input"):
        assert failure.node == node
    if "layers." in node:
        number = node.split("layers.")[1].split(".")[0].split("/")[0]
        assert f"layers.{number}" in failure.layer
    assert not code.startswith("E") or code in failure.line


def test_the_error_is_one_line_with_everything(view):
    text = (LOGS / "E20001.log").read_text(encoding="utf-8")
    error = AtcRunError(
        "decode_b1", explain_failure(text, 255, view), ["atc", "--mode=0"], 255, log_tail(text), "atc.log"
    )
    assert "\n" not in str(error)
    for words in ("decode_b1", "E20001", "exit code 255", "layers.30", "negative axes", "atc.log"):
        assert words in str(error)
    assert error.argv == ("atc", "--mode=0")
    assert "StridedSliceD" in error.tail


def test_without_a_graph_the_log_alone_is_used():
    failure = explain_failure((LOGS / "E16002.log").read_text(encoding="utf-8"), 255)
    assert (failure.op, failure.node, failure.layer) == ("NPUSwiGlu", "", "")


@pytest.mark.parametrize("code", ["E10999", "E16999", "E29111", "EB0001", "EZ1234", "EE1001", "E33333"])
def test_a_code_that_is_not_listed_is_placed_by_its_family(code):
    failure = explain_failure(f"{code}: something happened", 1)
    assert failure.code == code
    assert failure.meaning
    assert failure.cure


def test_words_are_no_codes():
    failure = explain_failure("[ERROR] EXCEPTION in E2E test E1 WARNING", 1)
    assert failure.code == ""


def test_the_table_covers_the_documented_codes():
    documented = (
        "E10001 E10002 E10007 E10054 E10009 E10047 E10010 E10011 E10012 E10031 E10016 E10018 E10035 E10036 E10040"
    )
    documented += (
        " E10045 E10055 E10501 E11010 E13010 E13023 E14001 E16001 E16002 E19010 E16004 E16005 E19999 E20001 EB0000"
    )
    documented += " EZ3002 EZ3003 EZ9999 W11001"
    assert set(documented.split()) <= set(known_codes())
    assert all(meaning and cure for meaning, cure in known_codes().values())


def test_a_killed_compiler_is_out_of_memory_whatever_it_said_before():
    text = (LOGS / "EZ3003.log").read_text(encoding="utf-8")
    assert explain_failure(text, -9).code == explain_failure(text, 137).code == "OOM"


def test_a_signal_is_named():
    assert "signal 11" in explain_failure("ATC start working now", -11).meaning
