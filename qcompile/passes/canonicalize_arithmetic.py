"""One spelling for arithmetic that exporters write in several ways.

    Pow(x, 2)                       -> x * x
    Pow(x, -1/2)                    -> Reciprocal(Sqrt(x))
    Pow(x, 3)                       -> x * x * x
    1 / x                           -> Reciprocal(x)
    x / c                           -> x * (1 / c)                 c: constant scalar
    x / Sqrt(v)                     -> x * Reciprocal(Sqrt(v))
    1 / (1 + Exp(-x))               -> Sigmoid(x)
    x / (1 + Exp(-x)), Swish(x)     -> x * Sigmoid(x)

Factors are not moved across a MatMul: in float16 that decides whether attention scores overflow.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.passes.rule import Reject, RulePass, SpellingRule, is_weight, require_near, scalar


class PowRule(SpellingRule):
    """Pow(x, c) for one c."""

    exponent: ClassVar[float]

    def pattern(self, op: Any, x: Any, exponent: Any) -> Any:
        return op.Pow(x, exponent)

    def require(self, exponent: ir.Value, **_: Any) -> None:
        require_near(exponent, self.exponent, "exponent", 0.0)


class PowToMul(PowRule):
    """Pow(x, 2) -> x * x."""

    exponent = 2.0

    def rewrite(self, op: Any, x: ir.Value, **_: Any) -> Any:
        return op.Mul(x, x)


class PowToCube(PowRule):
    """Pow(x, 3) -> (x * x) * x."""

    exponent = 3.0

    def rewrite(self, op: Any, x: ir.Value, **_: Any) -> Any:
        return op.Mul(op.Mul(x, x), x)


class PowToReciprocalRoot(PowRule):
    """Pow(x, -1/2) -> Reciprocal(Sqrt(x))."""

    exponent = -0.5

    def rewrite(self, op: Any, x: ir.Value, **_: Any) -> Any:
        return op.Reciprocal(op.Sqrt(x))


class DivOneToReciprocal(SpellingRule):
    """1 / x -> Reciprocal(x)."""

    def pattern(self, op: Any, one: Any, x: Any) -> Any:
        return op.Div(one, x)

    def require(self, one: ir.Value, x: ir.Value, **_: Any) -> None:
        require_near(one, 1.0, "dividend", 0.0)
        _require_float(self, x)
        if len(self.specs(one)[0].shape) > len(self.specs(x)[0].shape):
            raise Reject("the dividend adds dimensions")

    def rewrite(self, op: Any, x: ir.Value, **_: Any) -> Any:
        return op.Reciprocal(x)


class DivByRootToReciprocal(SpellingRule):
    """x / Sqrt(v) -> x * Reciprocal(Sqrt(v))."""

    def pattern(self, op: Any, x: Any, v: Any) -> Any:
        return op.Div(x, op.Sqrt(v))

    def require(self, x: ir.Value, v: ir.Value, **_: Any) -> None:
        if is_weight(v) or is_weight(x):
            raise Reject("constants are folded, not rewritten")

    def rewrite(self, op: Any, x: ir.Value, v: ir.Value, **_: Any) -> Any:
        return op.Mul(x, op.Reciprocal(op.Sqrt(v)))


class DivByConstantToMul(SpellingRule):
    """x / c -> x * (1 / c) for activations."""

    rounds_literals = True

    def pattern(self, op: Any, x: Any, c: Any) -> Any:
        return op.Div(x, c)

    def require(self, x: ir.Value, c: ir.Value, **_: Any) -> None:
        _require_float(self, x)
        if is_weight(x) or self.analysis.values(x) is not None:
            raise Reject("not an activation")
        if scalar(c, "divisor") == 0.0:
            raise Reject("divisor is 0")

    def rewrite(self, op: Any, x: ir.Value, c: ir.Value, **_: Any) -> Any:
        assert c.const_value is not None
        inverse = np.array(1.0 / scalar(c)).astype(c.const_value.numpy().dtype).reshape(c.const_value.shape.numpy())
        return op.Mul(x, op.initializer(ir.tensor(inverse), name=f"{c.name}.inverse"))


class LogisticRule(SpellingRule):
    """What is divided by 1 + Exp(-x)."""

    def require(self, one: ir.Value, **_: Any) -> None:
        require_near(one, 1.0, "what is added", 0.0)


class LogisticToSigmoid(LogisticRule):
    """1 / (1 + Exp(-x)) -> Sigmoid(x)."""

    def pattern(self, op: Any, x: Any, one: Any) -> Any:
        return op.Reciprocal(op.Add(op.Exp(op.Neg(x)), one))

    def rewrite(self, op: Any, x: ir.Value, **_: Any) -> Any:
        return op.Sigmoid(x)


class DivByLogisticToSilu(LogisticRule):
    """x / (1 + Exp(-x)) -> x * Sigmoid(x); the dividend may be another value than x."""

    def pattern(self, op: Any, x: Any, one: Any, y: Any) -> Any:
        return op.Div(y, op.Add(op.Exp(op.Neg(x)), one))

    def require(self, one: ir.Value, **bindings: Any) -> None:
        super().require(one)
        if is_weight(bindings["y"]):
            raise Reject("1 / (1 + Exp(-x)) is a Sigmoid alone")

    def rewrite(self, op: Any, x: ir.Value, y: ir.Value, **_: Any) -> Any:
        return op.Mul(y, op.Sigmoid(x))


class SwishToSilu(SpellingRule):
    """Swish of opset 24 with alpha 1 -> x * Sigmoid(x)."""

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Swish(x, _outputs=["y"])

    def require(self, y: ir.Value, **_: Any) -> None:
        node = y.producer()
        alpha = node.attributes.get("alpha") if node is not None else None
        if alpha is not None and alpha.as_float() != 1.0:
            raise Reject(f"alpha is {alpha.as_float()}")

    def rewrite(self, op: Any, x: ir.Value, **_: Any) -> Any:
        return op.Mul(x, op.Sigmoid(x))


def _require_float(rule: SpellingRule, x: ir.Value) -> None:
    if not rule.specs(x)[0].dtype.is_floating_point():
        raise Reject("not floating point")


class CanonicalizeArithmetic(RulePass):
    """Arithmetic that exporters spell differently."""

    name = "canonicalize-arithmetic"
    summary = "Pow, Div, Exp and Swish in one spelling"
    rules = (
        PowToMul,
        PowToCube,
        PowToReciprocalRoot,
        DivByLogisticToSilu,
        DivOneToReciprocal,
        LogisticToSigmoid,
        DivByRootToReciprocal,
        DivByConstantToMul,
        SwishToSilu,
    )
