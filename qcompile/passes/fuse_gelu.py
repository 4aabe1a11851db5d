"""Fuse the two spellings of GELU, and the standard operator, into qcompile::Gelu and qcompile::GeluTanh.

    Gelu:      y = x/2 * (1 + erf(x / sqrt 2))
    GeluTanh:  y = x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))

x, y: float, any shape. Source: Hendrycks & Gimpel 2016.
"""

from __future__ import annotations

import math

from qcompile.functions import GELU, GELU_TANH
from qcompile.passes.rule import FusionRule, OrValue, Reject, RulePass, scalar


class GeluErf(FusionRule):
    """Through erf: the factor 1 + erf(x / sqrt 2)."""

    emits = GELU

    def pattern(self, op, x, root):
        factor = op.Add(op.Erf(op.Mul(x, root)), 1.0)
        return op.Mul(op.Mul(x, 0.5), factor)

    def require(self, root, **_):
        _require_near(scalar(root, "factor of erf's argument"), math.sqrt(0.5))

    def rewrite(self, op, x, **_):
        return self.emit(op, x)


class GeluErfHalfLast(GeluErf):
    """The same with the half multiplied last."""

    def pattern(self, op, x, root):
        factor = op.Add(op.Erf(op.Mul(x, root)), 1.0)
        return op.Mul(op.Mul(x, factor), 0.5)


class GeluTanhChain(FusionRule):
    """Through tanh; x^3 as Pow or as products."""

    emits = GELU_TANH

    def pattern(self, op, x, bend, root):
        cube = OrValue([op.Pow(x, 3.0), op.Mul(op.Mul(x, x), x), op.Mul(x, op.Mul(x, x))])
        inner = op.Add(x, op.Mul(cube, bend))
        factor = op.Add(op.Tanh(op.Mul(inner, root)), 1.0)
        return op.Mul(op.Mul(x, 0.5), factor)

    def require(self, bend, root, **_):
        _require_near(scalar(bend, "factor of x^3"), 0.044715)
        _require_near(scalar(root, "factor of tanh's argument"), math.sqrt(2.0 / math.pi))

    def rewrite(self, op, x, **_):
        return self.emit(op, x)


class GeluOperator(FusionRule):
    """Gelu of opset 20, exact."""

    emits = GELU

    def pattern(self, op, x):
        return op.Gelu(x, _outputs=["y"])

    def require(self, y, **_):
        if _approximation(y) != "none":
            raise Reject(f"approximate is '{_approximation(y)}'")

    def rewrite(self, op, x, **_):
        return self.emit(op, x)


class GeluTanhOperator(FusionRule):
    """Gelu of opset 20, tanh approximation."""

    emits = GELU_TANH

    def pattern(self, op, x):
        return op.Gelu(x, _outputs=["y"])

    def require(self, y, **_):
        if _approximation(y) != "tanh":
            raise Reject(f"approximate is '{_approximation(y)}'")

    def rewrite(self, op, x, **_):
        return self.emit(op, x)


def _approximation(y) -> str:
    attribute = y.producer().attributes.get("approximate")
    return str(attribute.as_string()) if attribute is not None else "none"


def _require_near(value: float, wanted: float) -> None:
    if not math.isclose(value, wanted, rel_tol=1e-3):
        raise Reject(f"a constant is {value:.6g}, GELU has {wanted:.6g}")


class FuseGelu(RulePass):
    """GELU activations."""

    name = "fuse-gelu"
    summary = "x/2 * (1 + erf(x / sqrt 2)), or tanh -> Gelu, GeluTanh"
    rules = (GeluErf, GeluErfHalfLast, GeluTanhChain, GeluOperator, GeluTanhOperator)
