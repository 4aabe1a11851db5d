"""One spelling for arithmetic that exporters write in several ways.

    Pow(x, 2)                    -> x * x
    1 / x                        -> Reciprocal(x)
    x / c                        -> x * (1 / c)                 c: constant scalar
    x / Sqrt(v)                  -> x * Reciprocal(Sqrt(v))
    (a * c) @ b, a @ (b * c)     -> (a @ b) * c                 c: constant scalar; a, b: activations
    (x * c1) * c2                -> x * (c1 c2)
    Gemm(x, W, b)                -> MatMul(x, W) + b            alpha = beta = 1; W transposed lazily when transB
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.passes.rule import FusionRule, Reject, RulePass, is_weight, scalar
from qcompile.weights import transposed


class PowToMul(FusionRule):
    """Pow(x, 2) -> x * x."""

    def pattern(self, op, x):
        return op.Pow(x, 2.0)

    def rewrite(self, op, x, **_):
        return op.Mul(x, x)


class DivOneToReciprocal(FusionRule):
    """1 / x -> Reciprocal(x)."""

    def pattern(self, op, x):
        return op.Div(1.0, x)

    def require(self, x, **_):
        _require_float(self, x)

    def rewrite(self, op, x, **_):
        return op.Reciprocal(x)


class DivByRootToReciprocal(FusionRule):
    """x / Sqrt(v) -> x * Reciprocal(Sqrt(v))."""

    def pattern(self, op, x, v):
        return op.Div(x, op.Sqrt(v))

    def require(self, x, v, **_):
        if is_weight(v) or is_weight(x):
            raise Reject("constants are folded, not rewritten")

    def rewrite(self, op, x, v, **_):
        return op.Mul(x, op.Reciprocal(op.Sqrt(v)))


class DivByConstantToMul(FusionRule):
    """x / c -> x * (1 / c) for activations."""

    def pattern(self, op, x, c):
        return op.Div(x, c)

    def require(self, x, c, **_):
        _require_float(self, x)
        if is_weight(x) or self.analysis.values(x) is not None:
            raise Reject("not an activation")
        if scalar(c, "divisor") == 0.0:
            raise Reject("divisor is 0")

    def rewrite(self, op, x, c, **_):
        return op.Mul(x, scalar_like(op, c, 1.0 / scalar(c)))


class MergeScales(FusionRule):
    """(x * c1) * c2 -> x * (c1 c2)."""

    def pattern(self, op, x, c1, c2):
        return op.Mul(op.Mul(x, c1), c2)

    def require(self, x, c1, c2, **_):
        scalar(c1, "inner factor")
        scalar(c2, "outer factor")
        if is_weight(x):
            raise Reject("constants are folded, not rewritten")

    def rewrite(self, op, x, c1, c2, **_):
        return op.Mul(x, scalar_like(op, c1, scalar(c1) * scalar(c2)))


class ScaleAfterMatMulLeft(FusionRule):
    """(a * c) @ b -> (a @ b) * c for two activations."""

    def pattern(self, op, a, b, c):
        return op.MatMul(op.Mul(a, c), b)

    def require(self, a, b, c, **_):
        _require_activations(self, a, b, c)

    def rewrite(self, op, a, b, c, **_):
        return op.Mul(op.MatMul(a, b), c)


class ScaleAfterMatMulRight(FusionRule):
    """a @ (b * c) -> (a @ b) * c for two activations."""

    def pattern(self, op, a, b, c):
        return op.MatMul(a, op.Mul(b, c))

    def require(self, a, b, c, **_):
        _require_activations(self, a, b, c)

    def rewrite(self, op, a, b, c, **_):
        return op.Mul(op.MatMul(a, b), c)


class GemmToMatMul(FusionRule):
    """Gemm(x, W, b) -> MatMul(x, W) + b."""

    def pattern(self, op, x, weight, bias):
        return op.Gemm(x, weight, bias, _outputs=["y"])

    def require(self, x, weight, bias, y, **_):
        attributes = y.producer().attributes
        for name in ("alpha", "beta"):
            if name in attributes and attributes[name].as_float() != 1.0:
                raise Reject(f"{name} is {attributes[name].as_float()}")
        if "transA" in attributes and attributes["transA"].as_int():
            raise Reject("the activation is transposed")
        if not is_weight(weight):
            raise Reject("the second operand is not a weight")
        if bias is None or len(self.specs(bias)[0].shape) != 1:
            raise Reject("no bias of shape [N]")

    def rewrite(self, op, x, weight, bias, y, **_):
        trans = y.producer().attributes.get("transB")
        if trans is not None and trans.as_int():
            weight = op.initializer(transposed(weight.const_value), name=f"{weight.name}.transposed")
        return op.Add(op.MatMul(x, weight), bias)


def scalar_like(op, like: ir.Value, number: float) -> ir.Value:
    """Return a scalar constant with the dtype of another constant."""
    array = np.array(number, dtype=like.const_value.numpy().dtype)
    return op.initializer(ir.tensor(array), name=f"{like.name}.merged")


def _require_float(rule: FusionRule, x: ir.Value) -> None:
    if not rule.specs(x)[0].dtype.is_floating_point():
        raise Reject("not floating point")


def _require_activations(rule: FusionRule, a: ir.Value, b: ir.Value, c: ir.Value) -> None:
    scalar(c, "factor")
    if is_weight(a) or is_weight(b):
        raise Reject("one operand is a weight: the factor stays with its projection")


class CanonicalizeArithmetic(RulePass):
    """Arithmetic that exporters spell differently."""

    name = "canonicalize-arithmetic"
    summary = "Pow, Div, Gemm and attention scales in one spelling"
    rules = (
        PowToMul,
        DivOneToReciprocal,
        DivByRootToReciprocal,
        DivByConstantToMul,
        GemmToMatMul,
        ScaleAfterMatMulLeft,
        ScaleAfterMatMulRight,
        MergeScales,
    )
