"""Run one operator of domain `qcompile` through its definition on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import onnxruntime

from qcompile.functions import DOMAIN, fused_op

Array = np.ndarray


def call(name: str, inputs: Mapping[str, Array], **attributes: int) -> Array:
    """Return the output of an operator whose inputs are given in order."""
    values = []
    for key, array in inputs.items():
        kind = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        values.append(ir.Value(name=key, type=kind, shape=ir.Shape(array.shape)))
    node = ir.node(name, values, attributes, domain=DOMAIN)
    output = node.outputs[0]
    output.name = "y"
    scales = next((a.dtype for k, a in inputs.items() if k == "scales"), np.dtype(np.float32))
    output.type = ir.TensorType(ir.DataType.from_numpy(scales))
    graph = ir.Graph(values, [output], nodes=[node], opset_imports={"": 18, DOMAIN: 1}, name="call")
    model = ir.Model(graph, ir_version=9)
    fused_op(name).register(model)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, dict(inputs))[0])


def pack(codes: Array) -> Array:
    """Two codes to a byte, the first one low."""
    even = codes if codes.shape[1] % 2 == 0 else np.pad(codes, ((0, 0), (0, 1)))
    return (even[:, ::2] | (even[:, 1::2] << 4)).astype(np.uint8)
