"""Round the inputs of some Linears to int8 inside a small model, per token or by one step: what does it do to the outputs?"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser

_DOMAIN = "qcompile.calibration"
# x' = s * round(x / s), s = max|x| / 127 of each token (1 where a token is all zeros): qcompile.quant.activations
_ROUND = onnx.parser.parse_function(f"""
    <opset_import: ["" : 18], domain: "{_DOMAIN}">
    RoundPerToken (x) => (y) {{
      last = Constant <value = int64[1] {{-1}}> ()
      magnitude = Abs (x)
      largest = ReduceMax <keepdims = 1> (magnitude, last)
      codes = Constant <value = float {{127.0}}> ()
      step = Div (largest, codes)
      tiny = Constant <value = float {{1.1754943508222875e-38}}> ()
      is_silent = Less (step, tiny)
      one = Constant <value = float {{1.0}}> ()
      scale = Where (is_silent, one, step)
      scaled = Div (x, scale)
      rounded = Round (scaled)
      y = Mul (rounded, scale)
    }}""")

# x' = s * clip(round(x / s), -128, 127), one s for all: qcompile.quant.activations
_ROUND_BY_STEP = onnx.parser.parse_function(f"""
    <opset_import: ["" : 18], domain: "{_DOMAIN}">
    RoundByStep (x, step) => (y) {{
      scaled = Div (x, step)
      nearest = Round (scaled)
      least = Constant <value = float {{-128.0}}> ()
      most = Constant <value = float {{127.0}}> ()
      code = Clip (nearest, least, most)
      y = Mul (code, step)
    }}""")


def with_rounded_inputs(model: bytes, steps: Mapping[int, float | None]) -> bytes:
    """Return a model in which the first input of some nodes is rounded.

    Args:
        model: What `qcompile.passes.excerpt.model_of` returned; its activations are float32.
        steps: Position of each node to the step of its input; None for a step per token.
    """
    proto = onnx.ModelProto.FromString(model)
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    for index, node in enumerate(nodes):
        if index in steps:
            step, output = steps[index], f"{node.output[0]}.rounded_input"
            inputs, kind = [node.input[0]], "RoundPerToken"
            if step is not None:
                inputs, kind = [*inputs, f"{output}.step"], "RoundByStep"
                proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(step, np.float32), inputs[1]))
            proto.graph.node.append(onnx.NodeProto(op_type=kind, domain=_DOMAIN, input=inputs, output=[output]))
            node.input[0] = output
        proto.graph.node.append(node)
    proto.functions.extend([_ROUND, _ROUND_BY_STEP])
    proto.opset_import.append(onnx.OperatorSetIdProto(domain=_DOMAIN, version=1))
    return bytes(proto.SerializeToString())
