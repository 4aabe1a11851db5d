"""Round the inputs of some Linears to int8 per token inside a small model, to see what it does to the outputs."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
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


def with_rounded_inputs(model: bytes, indices: Sequence[int]) -> bytes:
    """Return a model in which the first input of some nodes is rounded.

    Args:
        model: What `qcompile.passes.excerpt.model_of` returned; its activations are float32.
        indices: Positions of the nodes.
    """
    proto = onnx.ModelProto.FromString(model)
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    for index, node in enumerate(nodes):
        if index in indices:
            output = f"{node.output[0]}.rounded_input"
            rounding = onnx.NodeProto(op_type="RoundPerToken", domain=_DOMAIN, input=[node.input[0]], output=[output])
            proto.graph.node.append(rounding)
            node.input[0] = output
        proto.graph.node.append(node)
    proto.functions.append(_ROUND)
    proto.opset_import.append(onnx.OperatorSetIdProto(domain=_DOMAIN, version=1))
    return bytes(proto.SerializeToString())
