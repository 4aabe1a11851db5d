"""Fuse the two spellings of GELU, and the standard operator, into qcompile::Gelu and qcompile::GeluTanh.

    Gelu:      y = x/2 * (1 + erf(x / sqrt 2))
    GeluTanh:  y = x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))

x, y: float, any shape. The half may stand at x, at the factor or at the product. Source: Hendrycks & Gimpel 2016.
"""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir

from qcompile.functions import GELU, GELU_TANH
from qcompile.passes.rule import FusionRule, Mismatch, OrValue, RulePass, require_near


class GeluErf(FusionRule):
    """Through erf: (x / 2) * (1 + erf)."""

    emits = GELU
    landmark = "Erf"
    rounds_literals = True

    def pattern(self, op: Any, x: Any, root: Any, one: Any, half: Any) -> Any:
        return op.Mul(op.Mul(x, half), _erf_factor(op, x, root, one))

    def require(self, root: ir.Value, one: ir.Value, half: ir.Value, **_: Any) -> None:
        require_near(root, math.sqrt(0.5), "factor of erf's argument")
        require_near(one, 1.0, "what is added to erf")
        require_near(half, 0.5, "factor of x")

    def rewrite(self, op: Any, x: ir.Value, **_: Any) -> Any:
        return self.emit(op, x)


class GeluErfHalfLast(GeluErf):
    """(x * (1 + erf)) / 2."""

    def pattern(self, op: Any, x: Any, root: Any, one: Any, half: Any) -> Any:
        return op.Mul(op.Mul(x, _erf_factor(op, x, root, one)), half)


class GeluErfHalfInside(GeluErf):
    """x * ((1 + erf) / 2)."""

    def pattern(self, op: Any, x: Any, root: Any, one: Any, half: Any) -> Any:
        return op.Mul(x, op.Mul(_erf_factor(op, x, root, one), half))


class GeluTanh(FusionRule):
    """Through tanh: (x / 2) * (1 + tanh)."""

    emits = GELU_TANH
    landmark = "Tanh"
    rounds_literals = True

    def pattern(self, op: Any, x: Any, bend: Any, root: Any, one: Any, half: Any) -> Any:
        return op.Mul(op.Mul(x, half), _tanh_factor(op, x, bend, root, one))

    def require(self, bend: ir.Value, root: ir.Value, one: ir.Value, half: ir.Value, **_: Any) -> None:
        require_near(bend, 0.044715, "factor of x^3")
        require_near(root, math.sqrt(2.0 / math.pi), "factor of tanh's argument")
        require_near(one, 1.0, "what is added to tanh")
        require_near(half, 0.5, "factor of x")

    def rewrite(self, op: Any, x: ir.Value, **_: Any) -> Any:
        return self.emit(op, x)


class GeluTanhHalfLast(GeluTanh):
    """(x * (1 + tanh)) / 2."""

    def pattern(self, op: Any, x: Any, bend: Any, root: Any, one: Any, half: Any) -> Any:
        return op.Mul(op.Mul(x, _tanh_factor(op, x, bend, root, one)), half)


class GeluTanhHalfInside(GeluTanh):
    """x * ((1 + tanh) / 2)."""

    def pattern(self, op: Any, x: Any, bend: Any, root: Any, one: Any, half: Any) -> Any:
        return op.Mul(x, op.Mul(_tanh_factor(op, x, bend, root, one), half))


class GeluOperator(FusionRule):
    """Gelu of opset 20, exact."""

    emits = GELU
    landmark = "Gelu"
    approximate = "none"

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Gelu(x, _outputs=["y"])

    def require(self, y: ir.Value, **_: Any) -> None:
        node = y.producer()
        attribute = node.attributes.get("approximate") if node is not None else None
        if (attribute.as_string() if attribute is not None else "none") != self.approximate:
            raise Mismatch

    def rewrite(self, op: Any, x: ir.Value, **_: Any) -> Any:
        return self.emit(op, x)


class GeluTanhOperator(GeluOperator):
    """Gelu of opset 20, tanh approximation."""

    emits = GELU_TANH
    approximate = "tanh"


def _erf_factor(op: Any, x: Any, root: Any, one: Any) -> Any:
    return op.Add(op.Erf(op.Mul(x, root)), one)


def _tanh_factor(op: Any, x: Any, bend: Any, root: Any, one: Any) -> Any:
    square = op.Mul(x, x)
    bent = op.Mul(OrValue([op.Mul(square, x), op.Mul(x, square)]), bend)
    factored = op.Add(op.Mul(square, bend), one)
    inner = OrValue([op.Add(x, bent), op.Add(bent, x), op.Mul(x, factored), op.Mul(factored, x)])
    return op.Add(op.Tanh(op.Mul(inner, root)), one)


class FuseGelu(RulePass):
    """GELU activations."""

    name = "fuse-gelu"
    summary = "x/2 * (1 + erf(x / sqrt 2)), or tanh -> Gelu, GeluTanh"
    rules = (
        GeluErf,
        GeluErfHalfLast,
        GeluErfHalfInside,
        GeluTanh,
        GeluTanhHalfLast,
        GeluTanhHalfInside,
        GeluOperator,
        GeluTanhOperator,
    )
