"""What every NPU operator that the lowering emits means: an ONNX function body with its argument order and semantics.

A lowered graph holds operators that no ONNX runtime knows. `reference_model` returns the same graph with each of them
calling its definition, so that the graph that goes to ATC, not an ancestor of it, is what is run and compared. The
bodies follow CANN's documentation; they were not compared with a device.

Rounding: ONNX Runtime's CPU computes float16 operators in float32 and drops the roundings between them where it can. A
chip rounds every kernel's result. So each float result is sent through a Reshape, which keeps its type and is not looked
through: without it the scores of Qwen2.5-0.5B looked ten times more exact than float16 is.
"""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir

from qcompile.ascend.lowering.static_graph import OPSET, dims

DOMAIN = "npu_reference"

# Letters: x [.., D], gamma [D]; rotary x [B,S,N,d], cos and sin [B,S,1,d].
_BODIES = {
    # y = x / sqrt(mean(x^2) + 1e-6) * gamma; the mean and the root in float32, whatever epsilon the node says
    "NPURmsNorm": """
    NPURmsNorm (x, gamma) => (y) {
      x32 = Cast <to = 1> (x)
      square = Mul (x32, x32)
      mean = ReduceMean <axes = [-1], keepdims = 1> (square)
      eps = Constant <value = float {1e-6}> ()
      variance = Add (mean, eps)
      root = Sqrt (variance)
      normal = Div (x32, root)
      gamma32 = Cast <to = 1> (gamma)
      scaled = Mul (normal, gamma32)
      y = CastLike (scaled, x)
    }""",
    # y = x * cos + rotate_half(x) * sin
    "NPURotaryMul": """
    NPURotaryMul (x, cos, sin) => (y) {
      first, second = Split <axis = -1> (x)
      negative = Neg (second)
      turned = Concat <axis = -1> (negative, first)
      straight = Mul (x, cos)
      crossed = Mul (turned, sin)
      y = Add (straight, crossed)
    }""",
}
NPU_OPS = frozenset(_BODIES)
# They move numbers and compute none.
_EXACT = {"Reshape", "Concat", "Gather", "Transpose", "Slice", "Split", "Identity", "Expand", "Cast", "TopK", "ArgMax"}
_HALVES = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


@functools.cache
def _function(op_type: str) -> onnx.FunctionProto:
    return onnx.parser.parse_function(f'<opset_import: ["" : {OPSET}], domain: "{DOMAIN}">\n{_BODIES[op_type]}')


def reference_model(model: ir.Model, *, keep_logits: bool = False) -> ir.Model:
    """Return a copy of a lowered graph that any ONNX runtime runs; weights are shared with the original.

    Args:
        model: The lowered graph.
        keep_logits: Make what the greedy choice is taken from an output, `logits` [B, 1, V], if it is none.
    """
    twin = model.clone()
    graph = twin.graph
    if keep_logits and not any(value.name == "logits" for value in graph.outputs):
        choice = next(node for node in graph if node.op_type == "ArgMax")
        logits = choice.inputs[0]
        assert logits is not None
        logits.name = "logits"
        graph.outputs.append(logits)
    used = set()
    for node in list(graph):
        if node.domain == "" and node.op_type in NPU_OPS:
            node.domain = DOMAIN
            node.attributes.clear()  # the parser ignores them, and so do the definitions
            used.add(node.op_type)
        if node.op_type not in _EXACT:
            _round_results(graph, node)
    for op_type in sorted(used):
        function = ir.serde.deserialize_function(_function(op_type))
        twin.functions[function.identifier()] = function
    if used:
        graph.opset_imports[DOMAIN] = 1
    return twin


def _round_results(graph: ir.Graph, node: ir.Node) -> None:
    for value in node.outputs:
        readers = list(value.uses())
        if value.dtype not in _HALVES or not readers:
            continue
        name = "rounded." + "x".join(map(str, dims(value)))
        if name not in graph.initializers:
            tensor = ir.Tensor(np.array(dims(value), dtype=np.int64), name=name)
            graph.register_initializer(ir.Value(name=name, const_value=tensor))
        barrier = ir.node("Reshape", [value, graph.initializers[name]], name=f"{value.name}.rounded")
        barrier.outputs[0].name = f"{value.name}.rounded"
        barrier.outputs[0].type, barrier.outputs[0].shape = value.type, value.shape
        graph.insert_after(node, barrier)
        for reader, index in readers:
            reader.replace_input_with(index, barrier.outputs[0])
