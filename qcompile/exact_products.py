"""Integer products made exact on every CPU, for what ONNX Runtime evaluates without its graph optimizers.

On x86 CPUs without VNNI its kernels for uint8 times int8 saturate (`qcompile/runtime/ort_options.py`), and what it has
against that is an optimizer. This does the same to the graph: the int8 operand becomes uint8, and so does its zero point.

    MatMulInteger(a, b, za, zb)  =  MatMulInteger(a, b + 128, za, zb + 128)
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

# Where the zero point of the second operand stands among the inputs; 0 when it is absent.
_ZERO_POINTS = {("", "MatMulInteger"): 3, ("com.microsoft", "MatMulIntegerToFloat"): 5}
_PRODUCT = b"MatMulInteger"  # is in both names


def with_exact_products(model_bytes: bytes) -> bytes:
    """Return the model with the int8 second operands of its integer products as uint8; the bytes as they are if it has none.

    In a function, where operands have no types, they are taken for int8: so they are in the functions of domain `qcompile`.
    """
    if _PRODUCT not in model_bytes:
        return model_bytes
    model = ir.from_proto(onnx.load_model_from_string(model_bytes))
    bodies: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for body in bodies:
        for node in list(body.all_nodes()):
            index = _ZERO_POINTS.get((node.domain, node.op_type))
            if index is not None:
                _make_unsigned(node, index)
    return bytes(ir.to_proto(model).SerializeToString())


def _make_unsigned(node: ir.Node, index: int) -> None:
    weight = node.inputs[1]
    if weight is None or weight.dtype not in (None, ir.DataType.INT8):
        return
    zero_point = node.inputs[index] if len(node.inputs) > index else None
    node.resize_inputs(max(index + 1, len(node.inputs)))
    node.replace_input_with(1, _unsigned(node, weight))
    node.replace_input_with(index, _before(node, "Constant", value=ir.tensor(np.uint8(128))))
    if zero_point is not None:
        node.replace_input_with(index, _unsigned(node, zero_point))


def _unsigned(node: ir.Node, codes: ir.Value) -> ir.Value:
    wide = _before(node, "Cast", codes, to=int(ir.DataType.INT32))
    moved = _before(node, "Add", wide, _before(node, "Constant", value=ir.tensor(np.int32(128))))
    return _before(node, "Cast", moved, to=int(ir.DataType.UINT8))


def _before(node: ir.Node, op_type: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
    made = ir.node(op_type, inputs, attributes)  # type: ignore[arg-type]
    assert node.graph is not None
    node.graph.insert_before(node, made)
    return made.outputs[0]
