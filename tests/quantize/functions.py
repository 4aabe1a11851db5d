"""Run one operator of domain `qcompile` through its definition on ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import onnxruntime

from qcompile.functions import DOMAIN, fused_op
from qcompile.runtime.ort_options import session_options

Array = np.ndarray


_FED = ("x", "indices")  # the others are weights: only as such are int8 ones multiplied exactly on every CPU


def call(name: str, inputs: Mapping[str, Array], *, result: type | None = None, **attributes: int) -> Array:
    """Return the output of an operator whose inputs are given in order, of the scales' type unless one is given."""
    values = []
    for key, array in inputs.items():
        kind = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        weight = None if key in _FED else ir.tensor(array, name=key)
        values.append(ir.Value(name=key, type=kind, shape=ir.Shape(array.shape), const_value=weight))
    node = ir.node(name, values, attributes, domain=DOMAIN)
    output = node.outputs[0]
    output.name = "y"
    scales = next((a.dtype for k, a in inputs.items() if k == "scales"), np.dtype(np.float32))
    output.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(result) if result is not None else scales))
    fed = [value for value in values if value.name in _FED]
    weights = [value for value in values if value.name not in _FED]
    graph = ir.Graph(fed, [output], nodes=[node], initializers=weights, opset_imports={"": 18, DOMAIN: 1}, name="call")
    model = ir.Model(graph, ir_version=9)
    fused_op(name).register(model)
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), session_options(onnxruntime), providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, {key: array for key, array in inputs.items() if key in _FED})[0])


def pack(codes: Array) -> Array:
    """Two codes to a byte, the first one low."""
    even = codes if codes.shape[1] % 2 == 0 else np.pad(codes, ((0, 0), (0, 1)))
    return (even[:, ::2] | (even[:, 1::2] << 4)).astype(np.uint8)
