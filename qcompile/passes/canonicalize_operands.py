"""Put the operands of commutative operators in one order, so that no fusion needs a twin for the mirrored spelling.

Activations come first, then control values (masks, cos, sin), then constants. Among activations a gate (Sigmoid) or a
reciprocal comes last, and a product with a Sigmoid comes first: `x * rsqrt(v)`, `gate * sigmoid(gate) * up`.
IEEE addition and multiplication commute exactly, so nothing changes and nothing needs a proof.
"""

from __future__ import annotations

import onnx_ir as ir

from qcompile.cases import Analysis
from qcompile.passes.base import Pass, PassContext, PassResult

_COMMUTATIVE = {"Add", "Mul", "And", "Or", "Xor", "Max", "Min", "Equal", "BitwiseAnd", "BitwiseOr"}


class CanonicalizeOperands(Pass):
    """Operand order of commutative operators."""

    name = "canonicalize-operands"
    summary = "one operand order for commutative operators"

    def call(self, context: PassContext, result: PassResult) -> None:
        """Swap where the second operand ranks before the first."""
        for node in context.model.graph:
            if node.domain != "" or node.op_type not in _COMMUTATIVE or len(node.inputs) != 2:
                continue
            first, second = node.inputs
            if first is None or second is None:
                continue
            result.matches += 1
            if _rank(second, context.analysis) < _rank(first, context.analysis):
                node.replace_input_with(0, second)
                node.replace_input_with(1, first)
                result.rewrites += 1


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
    if producer.op_type == "Mul" and any(_is_sigmoid(v) for v in producer.inputs):
        return -1
    return 0


def _is_sigmoid(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "Sigmoid"
