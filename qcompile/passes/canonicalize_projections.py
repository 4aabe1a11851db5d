"""One spelling for projections: MatMul(x [..., M], W [M, N]), plus Add of the bias, whatever the exporter wrote.

    Gemm(x, W, b)                                       -> MatMul(x, W) + b            alpha = beta = 1, transA = 0
    MatMul(x, Transpose(W))                             -> MatMul(x, W^T)              W^T transposed while saving
    Reshape(MatMul(Reshape(x, [-1, M]), W) [+ b], s)    -> MatMul(x, W) [+ b]          x and s agree but for the last axis

A weight that others read too (a tied embedding) keeps its Transpose: its bytes are stored once.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from qcompile.passes.rule import FusionRule, OrValue, Reject, RulePass, SpellingRule, is_weight
from qcompile.weights import transposed


class GemmRule(SpellingRule):
    """A Gemm that is a projection by a weight, with or without a bias."""

    def require(self, weight: ir.Value, y: ir.Value, bias: ir.Value | None = None, **_: Any) -> None:
        attributes = _attributes(y)
        if any(attributes[name].as_float() != 1.0 for name in ("alpha", "beta") if name in attributes):
            raise Reject("alpha or beta is not 1")
        if "transA" in attributes and attributes["transA"].as_int():
            raise Reject("the activation is transposed")
        if not is_weight(weight):
            raise Reject("the second operand is not a weight")
        if bias is not None and len(self.specs(bias)[0].shape) != 1:
            raise Reject("the bias is not [N]")

    def rewrite(
        self, op: Any, x: ir.Value, weight: ir.Value, y: ir.Value, bias: ir.Value | None = None, **_: Any
    ) -> Any:
        trans = _attributes(y).get("transB")
        if trans is not None and trans.as_int():
            weight = _transposed(op, weight)
        product = op.MatMul(x, weight)
        return product if bias is None else op.Add(product, bias)


class GemmToMatMul(GemmRule):
    """Gemm(x, W, b) -> MatMul(x, W) + b."""

    def pattern(self, op: Any, x: Any, weight: Any, bias: Any) -> Any:
        return op.Gemm(x, weight, bias, _outputs=["y"])


class GemmWithoutBias(GemmRule):
    """Gemm(x, W) -> MatMul(x, W)."""

    def pattern(self, op: Any, x: Any, weight: Any) -> Any:
        return op.Gemm(x, weight, _outputs=["y"])


class TransposedWeight(SpellingRule):
    """MatMul(x, Transpose(W)) -> MatMul(x, W^T), unless the bytes of W serve others too."""

    def pattern(self, op: Any, x: Any, weight: Any) -> Any:
        return op.MatMul(x, op.Transpose(weight, perm=[1, 0]))

    def require(self, weight: ir.Value, **_: Any) -> None:
        if not is_weight(weight) or len(weight.uses()) > 1 or weight.is_graph_output():
            raise Reject("not a weight of this projection alone")

    def rewrite(self, op: Any, x: ir.Value, weight: ir.Value, **_: Any) -> Any:
        return op.MatMul(x, _transposed(op, weight))


class RowsOfMatMul(SpellingRule):
    """Reshape(MatMul(Reshape(x), W)) -> MatMul(x, W)."""

    def pattern(self, op: Any, x: Any, weight: Any, rows: Any, shape: Any) -> Any:
        return op.Reshape(op.MatMul(op.Reshape(x, rows), weight), shape, _outputs=["y"])

    def require(self, x: ir.Value, weight: ir.Value, y: ir.Value, **_: Any) -> None:
        _require_same_rows(self, x, weight, y)

    def rewrite(self, op: Any, x: ir.Value, weight: ir.Value, **_: Any) -> Any:
        return op.MatMul(x, weight)


class RowsOfLinear(SpellingRule):
    """Reshape(MatMul(Reshape(x), W) + b) -> MatMul(x, W) + b."""

    def pattern(self, op: Any, x: Any, weight: Any, bias: Any, rows: Any, shape: Any) -> Any:
        product = op.MatMul(op.Reshape(x, rows), weight)
        return op.Reshape(OrValue([op.Add(product, bias), op.Add(bias, product)]), shape, _outputs=["y"])

    def require(self, x: ir.Value, weight: ir.Value, bias: ir.Value, y: ir.Value, **_: Any) -> None:
        if not is_weight(bias) or len(self.specs(bias)[0].shape) != 1:
            raise Reject("the bias is not a weight [N]")
        _require_same_rows(self, x, weight, y)

    def rewrite(self, op: Any, x: ir.Value, weight: ir.Value, bias: ir.Value, **_: Any) -> Any:
        return op.Add(op.MatMul(x, weight), bias)


def _attributes(y: ir.Value) -> dict[str, ir.Attr]:
    node = y.producer()
    return dict(node.attributes) if node is not None else {}


def _transposed(op: Any, weight: ir.Value) -> Any:
    assert weight.const_value is not None
    return op.initializer(transposed(weight.const_value), name=f"{weight.name}.transposed")


def _require_same_rows(rule: FusionRule, x: ir.Value, weight: ir.Value, y: ir.Value) -> None:
    """The rows of x [..., M] are the rows of y [..., N], seen through a matrix of rows in between."""
    if not is_weight(weight) or len(rule.specs(weight)[0].shape) != 2:
        raise Reject("not a projection by a weight")
    inputs, outputs = rule.specs(weight)[0].shape
    for before, after in zip(rule.specs(x), rule.specs(y), strict=True):
        if before.shape[-1:] != (inputs,) or after.shape != (*before.shape[:-1], outputs):
            raise Reject("the rows are arranged anew")


class CanonicalizeProjections(RulePass):
    """Projections by a weight."""

    name = "canonicalize-projections"
    summary = "Gemm, transposed weights and flattened rows -> MatMul (+ Add)"
    rules = (GemmToMatMul, GemmWithoutBias, TransposedWeight, RowsOfMatMul, RowsOfLinear)
