"""`qcompile inspect x.om`: what it shows, what it refuses, and that no damaged file upsets it."""

import json
import random
import resource
import time

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.ascend.chips import chip_named
from qcompile.ascend.om_fusions import judge_fusions
from qcompile.ascend.om_layout import HEADER, om_messages
from qcompile.ascend.om_reader import read_om, require_chip
from qcompile.ascend.om_report import om_record, render_om
from qcompile.ascend.om_writer import OmGraph, OmOp, write_om
from qcompile.ascend.proto_text import message_classes
from qcompile.cli.inspect import command
from qcompile.errors import AtcError, GraphError
from tests.ascend.om_files import decode_om, gear_om, mutated, port
from tests.graphs_on_disk import file_size_limit


def test_inputs_outputs_and_operators(tmp_path):
    om = read_om(decode_om(tmp_path))
    (model,) = om.models
    assert [(p.name, p.dtype, p.shape) for p in model.inputs] == [
        ("input_ids", "i64", (4, 1)),
        ("past", "f16", (4, 16, 64)),
    ]
    assert [(p.name, p.dtype) for p in model.outputs] == [
        ("/lm_head/MatMul:0:logits", "f32"),
        ("layers.1.new:0:present", "f16"),
    ]
    assert model.ops == {"MatMulV3": 2, "AddRmsNorm": 2, "RmsNorm": 1}
    assert model.fused_from["AddRmsNorm"] == 4
    assert model.weight_bytes == 8192
    assert model.soc_version == "Ascend910B4"
    assert om.header.platform_version == "test writer"
    assert [p.name for p in model.partitions] == ["MODEL_DEF", "WEIGHTS_DATA", "TASK_INFO", "TBE_KERNELS", "SO_BINS"]


def test_gears(tmp_path):
    (model,) = read_om(gear_om(tmp_path)).models
    assert model.gears == (((1, 128),), ((1, 512),))
    assert [p.name for p in model.inputs] == ["input_ids"]
    verdicts = {f.name: f.verdict for f in judge_fusions(model.ops)}
    assert verdicts["no format conversion"] == "missed"


def test_fusions_are_judged(tmp_path):
    (model,) = read_om(decode_om(tmp_path)).models
    assert {f.name: (f.verdict, f.done, f.left) for f in judge_fusions(model.ops)} == {
        "Add + RmsNorm": ("done", 2, 0),
        "MatMul kernels of the third generation": ("done", 2, 0),
    }
    path = tmp_path / "missed.om"
    norms = tuple(OmOp("RmsNorm", f"n{i}") for i in range(5))
    quantized = (OmOp("AscendDequant", "d"), OmOp("QuantBatchMatmulV3", "q"), OmOp("DynamicQuant", "dq"))
    write_om(path, "m", [OmGraph("g", (*norms, *quantized))], platform_version="t")
    verdicts = {f.name: (f.verdict, f.left) for f in judge_fusions(read_om(path).models[0].ops)}
    assert verdicts["Add + RmsNorm"] == ("missed", 4)
    assert verdicts["int8 MatMul + dequantize"] == ("missed", 1)
    assert verdicts["quantized MatMul"] == ("done", 0)


def test_the_command(tmp_path):
    path = decode_om(tmp_path)
    shown = CliRunner().invoke(command, [str(path)])
    assert shown.exit_code == 0, shown.output
    for words in ("Ascend910B4", "input_ids", "AddRmsNorm", "4 nodes", "WEIGHTS_DATA", "8,192", "Fusions"):
        assert words in shown.output
    record = json.loads(CliRunner().invoke(command, [str(path), "--json"]).stdout)
    assert record["models"][0]["ops"]["MatMulV3"] == 2
    assert record["models"][0]["inputs"][0] == {"name": "input_ids", "dtype": "i64", "shape": [4, 1], "layout": "ND"}
    assert CliRunner().invoke(command, [str(path), str(path)]).exit_code == 2


def test_old_layout_and_external_weights(tmp_path):
    """The table of older files: 32-bit numbers, no model_length."""
    kinds = om_messages()
    op = kinds["OpDef"](name="w", type="FileConstant")
    op.attr["location"].s = b"weight/weight_ab12"
    graph = kinds["GraphDef"](name="g", op=[op.SerializeToString()])
    definition = kinds["ModelDef"](name="old", graph=[graph.SerializeToString()]).SerializeToString()
    table = b"".join(n.to_bytes(4, "little") for n in (2, 0, 0, len(definition), 1, len(definition), 3))
    head = HEADER.pack(0x444F4D49, 256, 0x10000000, b"", 10, 0, 1, 0, 0, b"old", 0, b"", 0, 0, b"", 0, 0, 0, 1, b"")
    path = tmp_path / "old.om"
    path.write_bytes(head + table + definition + b"abc")
    om = read_om(path)
    assert om.header.is_dynamic
    assert om.models[0].external_weights == ("weight/weight_ab12",)
    assert om.models[0].weight_bytes == 3


def test_an_om_for_another_chip_is_refused_with_both_names(tmp_path):
    om = read_om(decode_om(tmp_path))
    require_chip(om, chip_named("910b4"))
    with pytest.raises(AtcError, match=r"Ascend910B4.*Ascend310P3"):
        require_chip(om, chip_named("310p3"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: b"", "starts with a header"),
        (lambda raw: raw[:100], "starts with a header"),
        (lambda raw: b"ONNX" + raw[4:], "is not an .om file"),
        (lambda raw: raw[:8] + b"\7\7\7\7" + raw[12:], "a newer CANN, or damaged"),
        (lambda raw: raw[:80] + b"\1" + raw[81:], "is encrypted"),
        (lambda raw: raw[:-1], "truncated"),
        (lambda raw: raw[:256] + b"\xff\xff\0\0" + raw[260:], "65535 partitions"),
        (lambda raw: raw[:264] + b"\x09" + raw[265:], "has no MODEL_DEF"),
        (lambda raw: raw[:280] + b"\xff" * 8 + raw[288:], "MODEL_DEF ends at byte"),
        (lambda raw: raw[:156] + b"\5" + raw[157:], "announces 5 models"),
        (lambda raw: raw[:384] + b"\xff" * 40 + raw[424:], "damaged"),
    ],
)
def test_a_damaged_file_is_one_clear_line(change, words, tmp_path):
    path = decode_om(tmp_path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(GraphError, match=words):
        read_om(path)


def test_500_mutated_files(tmp_path):
    """No crash, no hang, no memory by a length that was read (benchmarks/fuzz_om.py has 10,000)."""
    originals = [decode_om(tmp_path).read_bytes(), gear_om(tmp_path).read_bytes()]
    rng, path, read = random.Random(7), tmp_path / "mutated.om", 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index in range(500):
        path.write_bytes(mutated(originals[index % 2], rng))
        start = time.process_time()  # not the clock: machines stall
        try:
            om = read_om(path)
            om_record(om)
            render_om(om)
            read += 1
        except GraphError:
            pass
        assert time.process_time() - start < 1
    assert 50 < read < 450  # both outcomes are exercised
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


@given(st.binary(max_size=600))
@settings(max_examples=60, deadline=None)
def test_any_model_definition(tmp_path_factory, raw):
    path = decode_om(tmp_path_factory.mktemp("om"), weights=b"")
    whole = path.read_bytes()
    table = (1).to_bytes(8, "little") + b"".join(n.to_bytes(8, "little") for n in (0, 0, len(raw)))
    path.write_bytes(whole[:256] + table + raw)
    try:
        om = read_om(path)
    except GraphError:
        return
    assert len(om_record(om)["models"]) == 1


def test_a_full_disk_leaves_nothing(tmp_path):
    with file_size_limit(4096), pytest.raises(AtcError, match="cannot be written"):
        decode_om(tmp_path, weights=b"\1" * 100_000)
    assert list(tmp_path.iterdir()) == []


def test_the_proto_text_reader():
    text = 'syntax = "proto3"; package p; message A { repeated B b = 1; message B { int32 x = 2; } }'
    kinds = message_classes(text, "a.proto")
    message = kinds["A"]()
    message.b.add(x=5)
    assert kinds["A"].FromString(message.SerializeToString()).b[0].x == 5
    with pytest.raises(ValueError, match="unknown type"):
        message_classes('syntax = "proto3"; package p; message A { C c = 1; }', "b.proto")
    with pytest.raises(ValueError, match="ends within"):
        message_classes("message A { int32 x = 1;", "c.proto")


def test_odd_text_is_shown_escaped(tmp_path):
    path = tmp_path / "odd.om"
    ops = (OmOp("Data", "[red]x\x1b[2J", outputs=(port("", "f16", 1),), attributes={"index": 0}), OmOp("Mul", "m"))
    write_om(path, "n\x07", [OmGraph("g", ops)], platform_version="t")
    shown = CliRunner().invoke(command, [str(path)])
    assert shown.exit_code == 0
    assert "\x1b[2J" not in shown.output
    assert "[red]x" in shown.output
