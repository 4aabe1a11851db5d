"""What every NPU operator that the lowering emits means: an ONNX function body with its argument order and semantics.

A lowered graph holds operators that no ONNX runtime knows. `reference_model` returns the same graph with each of them
calling its definition, so that the graph that goes to ATC, not an ancestor of it, is what is run and compared. The
bodies follow CANN's documentation; they were not compared with a device.
"""

from __future__ import annotations

import functools

import onnx
import onnx.parser
import onnx_ir as ir

from qcompile.ascend.lowering.static_graph import OPSET

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


@functools.cache
def _function(op_type: str) -> onnx.FunctionProto:
    return onnx.parser.parse_function(f'<opset_import: ["" : {OPSET}], domain: "{DOMAIN}">\n{_BODIES[op_type]}')


def reference_model(model: ir.Model) -> ir.Model:
    """Return a copy of a lowered graph that any ONNX runtime runs; weights are shared with the original."""
    twin = model.clone()
    used = set()
    for node in twin.graph:
        if node.domain == "" and node.op_type in NPU_OPS:
            node.domain = DOMAIN
            node.attributes.clear()  # the parser ignores them, and so do the definitions
            used.add(node.op_type)
    for op_type in sorted(used):
        function = ir.serde.deserialize_function(_function(op_type))
        twin.functions[function.identifier()] = function
    if used:
        twin.graph.opset_imports[DOMAIN] = 1
    return twin
