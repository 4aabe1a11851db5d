"""Two passes that replace calls by definitions: functions an exporter left, and fused operators without a kernel."""

import onnx.parser
import onnx_ir as ir

from qcompile.passes.base import PassContext
from qcompile.passes.inline_exporter_functions import InlineExporterFunctions
from qcompile.passes.inline_functions import InlineFunctions
from qcompile.passes.proof import Prover
from tests.passes.graph_text import draw_feeds, expressions, model_bytes, read_graph, run_graph
from tests.passes.norms import SHAPE, SIGNATURE
from tests.passes.six_tests import EXACT, Example, NearMiss, SixTests

SILU = '<opset_import: ["" : 18], domain: "pkg.torch">\naten_silu (v) => (w) { s = Sigmoid(v) w = Mul(v, s) }'
TWO_DOMAINS = '<opset_import: ["" : 18, "pkg.torch" : 1], domain: "pkg.torch">\n'
NESTED = TWO_DOMAINS + "outer (v) => (w) { s = pkg.torch.aten_silu(v) w = Neg(s) }"
CYCLE = TWO_DOMAINS + "aten_silu (v) => (w) { w = pkg.torch.aten_silu(v) }"


def with_functions(text, *functions):
    model = read_graph(text)
    for function in functions:
        parsed = ir.serde.deserialize_function(onnx.parser.parse_function(function))
        model.functions[parsed.identifier()] = parsed
    model.graph.opset_imports["pkg.torch"] = 1
    return model


class TestInlineFunctions(SixTests):
    pass_class = InlineFunctions
    examples = (
        Example(
            "SwiGlu",
            f"({SHAPE} a, {SHAPE} b) => ({SHAPE} y) {{ y = qcompile.SwiGlu(a, b) }}",
            {"y": "Mul(Mul(a, Sigmoid(a)), b)"},
        ),
        Example(
            "two calls",
            f"{SIGNATURE} {{ a = qcompile.Linear(x, w, b) y = qcompile.Linear(a, w, b) }}",
            {"y": "Add(MatMul(Add(MatMul(x, w), b), w), b)"},
            {"w": (8, 8), "b": (8,)},
            rewrites=2,
        ),
        Example(
            "an attribute", f"{SIGNATURE} {{ y = qcompile.RmsNorm<epsilon = 0.25>(x, gamma) }}", None, {"gamma": (8,)}
        ),
    )
    near_misses = (NearMiss("no calls", f"{SIGNATURE} {{ y = Neg(x) }}", None),)
    counts = (("qwen2-builder", 0), ("qwen2-optimum", 0))


class TestInlineExporterFunctions(SixTests):
    pass_class = InlineExporterFunctions
    limits = EXACT
    examples = (
        Example(
            "fused operators stay",
            f"({SHAPE} a, {SHAPE} b) => ({SHAPE} y) {{ y = qcompile.SwiGlu(a, b) }}",
            {"y": "qcompile::SwiGlu(a, b)"},
            rewrites=0,
        ),
    )
    near_misses = (NearMiss("no calls", f"{SIGNATURE} {{ y = Neg(x) }}", None),)
    counts = (("qwen2-builder", 0), ("qwen2-dynamo-sdpa", 0))


def test_exporter_functions_are_inlined_nested_ones_too():
    model = with_functions(f"{SIGNATURE} {{ a = pkg.torch.aten_silu(x) y = pkg.torch.outer(a) }}", SILU, NESTED)
    feeds = draw_feeds(model, 2, 3)
    before = run_graph(model, feeds)
    context = PassContext(model, Prover())
    assert InlineExporterFunctions()(context).rewrites == 2
    assert not model.functions
    silu = "Mul(x, Sigmoid(x))"
    assert expressions(model) == {"y": f"Neg(Mul({silu}, Sigmoid({silu})))"}
    assert (run_graph(model, feeds)[0] == before[0]).all()
    bytes_before = model_bytes(model)
    assert InlineExporterFunctions()(context).rewrites == 0
    assert model_bytes(model) == bytes_before


def test_cyclic_definitions_stay_with_a_reason():
    context = PassContext(with_functions(f"{SIGNATURE} {{ y = pkg.torch.aten_silu(x) }}", CYCLE), Prover())
    before = model_bytes(context.model)
    result = InlineExporterFunctions()(context)
    assert result.rewrites == 0
    assert "functions stay" in result.rejected[0].reason
    assert model_bytes(context.model) == before
