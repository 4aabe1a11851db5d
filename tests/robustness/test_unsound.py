"""Operators and functions of others, and graphs that break the rules of ONNX."""

import onnx
import onnx.parser
import pytest

from qcompile.artifact import load_model
from qcompile.errors import GraphError, QCompileError
from qcompile.passes.base import op_histogram
from qcompile.pipeline import OptimizeOptions, optimize
from tests.robustness.edits import FUSED, WEIGHT, Edit, append, assert_unharmed, counts, fixed, fuse, in_front


def foreign(text: str, *outputs: str, then: Edit | None = None) -> Edit:
    def edit(proto: onnx.ModelProto) -> None:
        proto.opset_import.append(onnx.OperatorSetIdProto(domain="acme", version=1))
        (then or append(text, *outputs))(proto)

    return edit


@pytest.mark.parametrize("target", ["portable", "ort"])
def test_an_operator_that_nobody_knows_stays_where_it_is(edited, tmp_path, target):
    way = in_front("magic = acme.Magic <strength = 3> (VALUE)", "layers.0.mlp.residual", "magic")
    report = fuse(edited(foreign("", then=way)), target)
    model = load_model(tmp_path / "out" / "model.onnx")
    (magic,) = [n for n in model.graph if n.domain == "acme"]
    assert magic.attributes["strength"].as_int() == 3
    assert [user.op_type for user, _ in magic.outputs[0].uses()] != []
    assert report.count("fuse-attention") >= 1


def test_functions_that_call_themselves_stay(edited, tmp_path):
    def edit(proto: onnx.ModelProto) -> None:
        text = '<opset_import: ["" : 18, "acme" : 1], domain: "acme"> F (x) => (y) { y = acme.F (x) }'
        proto.functions.append(onnx.parser.parse_function(text))
        append("looped = acme.F (logits)", "looped")(proto)

    report = fuse(edited(foreign("", then=edit)))
    (rejection,) = [r for result in report.results for r in result.rejected]
    assert "Cyclic dependency" in rejection.reason
    assert counts(report) == FUSED


class TestFunctionsOfOurDomain:
    BODY = (
        '<opset_import: ["" : 18], domain: "qcompile"> {name} (x, gamma) => (y) {{ a = Relu (x) y = Mul (a, gamma) }}'
    )

    def edit(self, name: str) -> Edit:
        def edit(proto: onnx.ModelProto) -> None:
            proto.opset_import.append(onnx.OperatorSetIdProto(domain="qcompile", version=1))
            proto.functions.append(onnx.parser.parse_function(self.BODY.format(name=name)))
            append(f"own = qcompile.{name} <epsilon = 0.5> (logits, logits)".replace(" <epsilon = 0.5>", ""), "own")(
                proto
            )

        return edit

    @pytest.mark.parametrize("name", ["RmsNorm", "Own"])
    def test_what_stands_in_the_file_counts(self, edited, name):
        path = edited(self.edit(name))
        assert counts(fuse(path)) == FUSED
        assert_unharmed(path)

    def test_two_meanings_of_one_name_are_refused(self, edited):
        with pytest.raises(GraphError, match="function qcompile::RmsNorm is not what this version means by it"):
            fuse(edited(self.edit("RmsNorm")), skip=("inline-exporter-functions",))

    def test_a_model_fused_before_is_recognized(self, exported, tmp_path):
        first, second = tmp_path / "first", tmp_path / "second"
        optimize(exported, first, OptimizeOptions(target="portable"))
        report = optimize(first, second, OptimizeOptions(target="portable"))
        assert report.count("inline-exporter-functions") == 0
        assert op_histogram(load_model(first / "model.onnx")) == op_histogram(load_model(second / "model.onnx"))


def rename_first_input(name: str) -> Edit:
    def edit(proto: onnx.ModelProto) -> None:
        proto.graph.node[3].input[0] = name

    return edit


def shorten_weight(proto: onnx.ModelProto) -> None:
    tensor = next(t for t in proto.graph.initializer if t.name == WEIGHT)
    tensor.raw_data = tensor.raw_data[:-1]


def negative_weight(proto: onnx.ModelProto) -> None:
    next(t for t in proto.graph.initializer if t.name == WEIGHT).dims[0] = -64


def no_imports(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].domain = "acme"


def call_without(attributes: str, arguments: str) -> Edit:
    def edit(proto: onnx.ModelProto) -> None:
        proto.opset_import.append(onnx.OperatorSetIdProto(domain="qcompile", version=1))
        append(f"odd = qcompile.Attention {attributes} ({arguments})", "odd")(proto)

    return edit


REFUSED: dict[str, tuple[Edit, str]] = {
    "nodes in a circle": (append("a = Relu (b) b = Relu (a)", "a"), "read each other in a circle"),
    "a value from nowhere": (
        rename_first_input("nowhere"),
        "reads 'nowhere', which no node, input or initializer gives",
    ),
    "an output from nowhere": (append("", "ghost"), "no node gives the output 'ghost'"),
    "one name twice": (append("logits = Relu (logits)"), "the graph is malformed: Output 'logits' is redeclared"),
    "two inputs of a name": (lambda p: p.graph.input.append(p.graph.input[0]), "two inputs are named 'input_ids'"),
    "a node without type": (lambda p: p.graph.node[3].ClearField("op_type"), "has no operator type"),
    "no standard operators": (no_imports, "uses standard operators and imports acme only"),
    "too few bytes": (shorten_weight, "has 255 bytes, its type FLOAT and shape [64] need 256"),
    "a negative dimension": (negative_weight, "has shape [-64]; dimensions are not negative"),
    "a length without end": (fixed(length=10**7), "too large to study; export it with dynamic dimensions"),
    "an attribute of another type": (
        append("odd = Softmax <axis = 0.5> (logits)"),
        "attribute axis is FLOAT, the operator takes INT",
    ),
    "a constant of no type": (
        append('odd = Constant <value = "text"> ()'),
        "attribute value is STRING, the operator takes TENSOR",
    ),
    "a call with a number for a word": (
        call_without("<num_heads = 2.5, kv_num_heads = 1, scale = 1.0>", "logits"),
        "attribute num_heads is FLOAT, the operator takes INT",
    ),
    "a call without attribute": (call_without("", "logits"), "(Attention) has no attribute num_heads"),
    "a call without inputs": (
        call_without("<num_heads = 2, kv_num_heads = 1, scale = 1.0>", "logits"),
        "has 1 inputs and 1 outputs, the operator 8 and 3",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_unsound_graphs_are_refused_in_one_line(edited, tmp_path, what):
    edit, message = REFUSED[what]
    with pytest.raises(QCompileError) as refusal:
        fuse(edited(edit))
    assert message in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_constant_nobody_may_fold_stays(edited, tmp_path):
    text = "a = RandomNormal <shape = [2, 2]> () b = RandomNormal <shape = [2, 2]> () noise = Sub (a, b)"
    fuse(edited(append(text, "noise")))
    assert op_histogram(load_model(tmp_path / "out" / "model.onnx"))["RandomNormal"] == 2


def test_a_long_chain_is_no_deep_recursion(edited):
    chain = "p0 = Identity (position_ids) " + " ".join(f"p{i + 1} = Abs (p{i})" for i in range(1200))
    report = fuse(edited(in_front(chain, "position_ids", "p1200")), "ort")
    lowered = next(r for r in report.results if r.name == "lower-attention-to-ort")
    assert (lowered.rewrites, lowered.detail["rotary"]) == (2, "inside the kernel, by tables")


def test_a_name_that_is_no_text_is_refused(edited):
    path = edited(lambda proto: None)
    path.write_bytes(path.read_bytes().replace(b"layers.0.mlp.residual", b"layers.0.mlp.\xff\xfesidual"))
    with pytest.raises(GraphError, match=r"b'layers\.0\.mlp\.\\xff\\xfesidual' is not UTF-8"):
        fuse(path)
