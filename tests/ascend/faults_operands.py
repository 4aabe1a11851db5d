"""Faults of operands: values nobody makes, mixed types, lengths that do not fit, modes the chip lacks."""

from __future__ import annotations

import numpy as np
import onnx

from qcompile.ascend.legality.rule import AtcOptions
from tests.ascend.faults import Fault, changed, node_of, replaced, unary
from tests.ascend.graphs import (
    constants,
    dynamic_w8a8,
    norm_model,
    ones,
    packed_scale,
    parsed,
    static_w8a8,
    weight_only,
)


def infinite_fill() -> onnx.ModelProto:
    fill = "mask = ConstantOfShape <value = float {-inf}> (shape)".replace("float {-inf}", "float[1] {0.0}")
    model = parsed(f"{fill} y = Add (x, mask)", "float[8] x", "float[8] y", "float[8] mask")
    node_of(model, "ConstantOfShape").attribute[0].t.CopyFrom(
        onnx.numpy_helper.from_array(np.array([-np.inf], np.float32))
    )
    return constants(model, shape=np.array([8], np.int64))


def smoothed(length: int):
    body = "y, s = NPUDynamicQuant (x, smooth)"
    return lambda: constants(parsed(body, outputs="int8[1,8,64] y, float[1,8] s"), smooth=ones(length))


def quantized_by(length: int):
    body = "y = NPUAscendQuantV2 (x, scale)"
    return lambda: constants(parsed(body, outputs="int8[1,8,64] y"), scale=ones(length))


def with_offset(model: onnx.ModelProto) -> None:
    node = node_of(model, "QuantBatchMatMul")
    inputs = [*node.input[:3], "offset"]
    del node.input[:]
    node.input.extend(inputs)
    constants(model, offset=ones(32, dtype=np.float32))


def shortened(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.raw_data = tensor.raw_data[:-2]


def reshaped(*sizes: int, attributes: str = ""):
    body = f"y = Reshape {attributes} (x, shape)"
    return lambda: constants(parsed(body, outputs="float16[rows,columns] y"), shape=np.array(sizes, np.int64))


def in_a_circle(model: onnx.ModelProto) -> None:
    node_of(model, "Sigmoid").input[0] = "b"


def upside_down(model: onnx.ModelProto) -> None:
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def gated() -> onnx.ModelProto:
    return parsed("a = Sigmoid (x) b = Mul (x, a) y = Relu (b)", values="float16[1,8,64] a, float16[1,8,64] b")


OPERAND_FAULTS = [
    Fault("Reshape to fewer elements", reshaped(8, 32), "reshape-count", "E14001"),
    Fault("Reshape that -1 cannot fill", reshaped(-1, 48), "reshape-count", "E14001"),
    Fault("Reshape with two -1", reshaped(-1, -1), "reshape-count", "E14001"),
    Fault("Reshape that copies a dimension too many", reshaped(1, 8, 64, 0), "reshape-count", "E14001"),
    Fault("Reshape to nothing", reshaped(0, 64, attributes="<allowzero = 1>"), "reshape-count", "E14001"),
    Fault("nodes before what they read", changed(gated, upside_down), "node-order", "E19999"),
    Fault("nodes in a circle", changed(gated, in_a_circle), "graph-cycle", "E19999"),
    Fault("a weight with too few bytes", changed(norm_model, shortened), "weight-size", "E19999"),
    Fault("fp16 plus an fp32 constant", lambda: constants(parsed("y = Add (x, b)"), b=ones(64, dtype=np.float32)),
          "operand-types-differ", "EZ3002"),
    Fault("fp16 times an fp32 weight", lambda: constants(parsed("y = MatMul (x, w)"), w=ones(64, 64, dtype=np.float32)),
          "operand-types-differ", "EZ3002"),
    Fault("joined types", lambda: constants(parsed("y = Concat <axis = 1> (x, c)", outputs="float16[1,9,64] y"),
                                            c=ones(1, 1, 64, dtype=np.float32)), "operand-types-differ", "EZ3002"),
    Fault("a weight of other rows", lambda: constants(parsed("y = MatMul (x, w)"), w=ones(63, 64)),
          "matmul-shape", "E14001"),
    Fault("weight-only with other rows", changed(weight_only, replaced("w", ones(96, 48, dtype=np.int8))),
          "matmul-shape", "E14001"),
    Fault("an input that nothing makes", lambda: parsed("y = Add (x, lost)"), "input-undefined", "E19999"),
    Fault("an output that nothing makes", lambda: parsed("z = Sigmoid (x)", values="float16[1,8,64] z"),
          "input-undefined", "E19999"),
    Fault("a name made twice", lambda: parsed("y = Sigmoid (x) y = Neg (x)"), "output-defined-twice", "E19999"),
    Fault("a node that writes an input", lambda: parsed("x = Sigmoid (x) y = Neg (x)"), "output-defined-twice", "E19999"),
    Fault("ConstantOfShape of -inf", infinite_fill, "infinite-constant", ""),
    Fault("scale of another width", changed(dynamic_w8a8, replaced("ws", ones(16, dtype=np.float32))),
          "scale-shape", "E14001"),
    Fault("packed scale of another width", changed(static_w8a8, replaced("scale", packed_scale(ones(16)))),
          "scale-shape", "E14001"),
    Fault("offset for f16 out", changed(static_w8a8, with_offset), "quant-types", "EZ3002"),
    Fault("smooth scales of another width", smoothed(63), "scale-shape", "E14001"),
    Fault("NPUAscendQuantV2 with scales of another width", quantized_by(63), "scale-shape", "E14001"),
    Fault("bf16 mode on 310P", unary("Sigmoid"), "precision-mode-chip", "E10001", "310p3",
          options=AtcOptions(precision_mode="allow_mix_precision_bf16")),
    Fault("mode of the 950", unary("Sigmoid"), "precision-mode-chip", "E10001",
          options=AtcOptions(precision_mode_v2="cube_hif8")),
]  # fmt: skip
