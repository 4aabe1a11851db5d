"""Put operands and axes in one order, so that no fusion needs a twin for the mirrored spelling.

Operands of commutative operators: activations first, then control values (masks, cos, sin), then constants. Among
activations a gate (Sigmoid), a curve (1 + erf, 1 + tanh) or a reciprocal comes last, a product with a Sigmoid first and a
product with a rotated half (Concat) last: `x * rsqrt(v)`, `gate * sigmoid(gate) * up`, `x * cos + rotate_half(x) * sin`.
Axes: counted from the end where they mean the last one, `axis = -1`.
IEEE addition and multiplication commute exactly, so nothing changes and nothing needs a proof.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.analysis import Analysis
from qcompile.passes.base import Pass, PassContext, PassResult
from qcompile.passes.change import named_constant

_COMMUTATIVE = {"Add", "Mul", "And", "Or", "Xor", "Max", "Min", "Equal", "BitwiseAnd", "BitwiseOr"}
_WITH_AXIS = {"Concat", "Softmax", "LogSoftmax", "Split", "LayerNormalization", "RMSNormalization"}
# Before it a Softmax runs over all axes from `axis` on.
_LAST_AXIS_OPSET = 13
_SOFTMAX_OPS = {"Softmax", "LogSoftmax"}
_REDUCTIONS = {"ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSumSquare", "ReduceL2"}


class CanonicalizeOperands(Pass):
    """Operand order of commutative operators, and the last axis."""

    name = "canonicalize-operands"
    summary = "one order for operands of commutative operators; the last axis is -1"

    def call(self, context: PassContext, result: PassResult) -> None:
        """Swap where the second operand ranks before the first; rewrite axes that mean the last."""
        for node in context.model.graph:
            if node.domain == "":
                result.rewrites += _swap(node, context.analysis) + _last_axis(node, context)
        result.matches = result.rewrites


def _swap(node: ir.Node, analysis: Analysis) -> int:
    if node.op_type not in _COMMUTATIVE or len(node.inputs) != 2:
        return 0
    first, second = node.inputs
    if first is None or second is None or _rank(second, analysis) >= _rank(first, analysis):
        return 0
    node.replace_input_with(0, second)
    node.replace_input_with(1, first)
    return 1


def _last_axis(node: ir.Node, context: PassContext) -> int:
    if not node.inputs or node.inputs[0] is None:
        return 0
    specs = context.analysis.specs(node.inputs[0])
    if specs is None:
        return 0
    last = len(specs[0].shape) - 1
    if context.model.graph.opset_imports.get("", 0) < _LAST_AXIS_OPSET:
        return 0
    axis = node.attributes.get("axis")
    is_last = axis.as_int() == last if axis is not None else node.op_type in _SOFTMAX_OPS
    if node.op_type in _WITH_AXIS and is_last:
        node.attributes["axis"] = ir.AttrInt64("axis", -1)
        return 1
    axes = node.inputs[1] if node.op_type in _REDUCTIONS and len(node.inputs) > 1 else None
    if axes is None or axes.const_value is None or axes.const_value.numpy().reshape(-1).tolist() != [last]:
        return 0
    node.replace_input_with(1, named_constant(context.model.graph, "axes.last", np.array([-1], dtype=np.int64)))
    return 1


def _rank(value: ir.Value, analysis: Analysis) -> int:
    if value.const_value is not None:
        return 9
    if analysis.values(value) is not None:
        return 8
    producer = value.producer()
    if producer is None:
        return 0
    if producer.op_type in {"Sigmoid", "Reciprocal"}:
        return 5
    if _is_curve(producer):
        return 3
    if producer.op_type != "Mul":
        return 0
    if any(v is not None and _is_curve(v.producer()) for v in producer.inputs):
        # A scaled curve stands where the curve would; a product of x and its curve is an activation like any other.
        return 3 if any(v is not None and v.const_value is not None for v in producer.inputs) else 0
    if any(_comes_from(v, "Sigmoid") for v in producer.inputs):
        return -1
    return 1 if any(_comes_from(v, "Concat") for v in producer.inputs) else 0


def _is_curve(node: ir.Node | None) -> bool:
    """Whether a node is 1 + erf(...) or 1 + tanh(...)."""
    return (
        node is not None
        and node.op_type == "Add"
        and any(_comes_from(v, "Erf") or _comes_from(v, "Tanh") for v in node.inputs)
    )


def _comes_from(value: ir.Value | None, op_type: str) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == op_type
