"""Fuse the primitive chain of a root-mean-square norm, or the standard operator, into qcompile::RmsNorm.

    y = x * rsqrt(mean(x * x, -1) + eps) * gamma

x, y: float32 | float16 | bfloat16 [..., D]; gamma: [D]; eps: constant scalar. In half precision the chain runs in
float32 between two Casts, as transformers' Qwen2RMSNorm does.
Source: Zhang & Sennrich 2019, eq. 4.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from qcompile.functions import RMS_NORM
from qcompile.passes.rule import FusionRule, Mismatch, Reject, RulePass, require_row_weight, scalar


def normalized(op: Any, x: Any, eps: Any) -> Any:
    """The canonical chain before gamma: x * Reciprocal(Sqrt(mean(x * x) + eps))."""
    square = op.Mul(x, x)
    mean = op.ReduceMean(square, [-1])
    return op.Mul(x, op.Reciprocal(op.Sqrt(op.Add(mean, eps))))


class RmsNormChain(FusionRule):
    """The chain of primitive operators."""

    emits = RMS_NORM
    landmark = "ReduceMean"

    def require(self, x: ir.Value, gamma: ir.Value, eps: ir.Value, **_: Any) -> None:
        if _is_centred(x):
            raise Mismatch
        scalar(eps, "epsilon")
        require_row_weight(self, x, gamma, "gamma")

    def rewrite(self, op: Any, x: ir.Value, gamma: ir.Value, eps: ir.Value, **_: Any) -> Any:
        return self.emit(op, x, gamma, epsilon=scalar(eps))


class RmsNorm(RmsNormChain):
    """The chain in the dtype of the graph."""

    def pattern(self, op: Any, x: Any, gamma: Any, eps: Any) -> Any:
        return op.Mul(normalized(op, x, eps), gamma)


class RmsNormInFloat32(RmsNormChain):
    """The chain between Cast(x, float32) and a Cast back, in half-precision graphs."""

    def pattern(self, op: Any, x: Any, gamma: Any, eps: Any, to: Any) -> Any:
        x32 = op.Cast(x, to=ir.DataType.FLOAT)
        return op.Mul(op.Cast(normalized(op, x32, eps), to=to), gamma)

    def require(self, x: ir.Value, gamma: ir.Value, eps: ir.Value, **bindings: Any) -> None:
        super().require(x=x, gamma=gamma, eps=eps)
        to = ir.DataType(bindings["to"].as_int())
        dtype = self.specs(x)[0].dtype
        if to != dtype:
            raise Reject(f"the norm returns {to.name} for an input of {dtype.name}")


class RmsNormalization(FusionRule):
    """The standard operator of opset 23."""

    emits = RMS_NORM
    landmark = "RMSNormalization"

    def pattern(self, op: Any, x: Any, gamma: Any) -> Any:
        return op.RMSNormalization(x, gamma, _outputs=["y"])

    def require(self, x: ir.Value, gamma: ir.Value, y: ir.Value, **_: Any) -> None:
        require_last_axis(self, x, y)
        require_row_weight(self, x, gamma, "gamma")

    def rewrite(self, op: Any, x: ir.Value, gamma: ir.Value, y: ir.Value, **_: Any) -> Any:
        return self.emit(op, x, gamma, epsilon=norm_epsilon(y))


def require_last_axis(rule: FusionRule, x: ir.Value, y: ir.Value) -> None:
    """Reject unless the norm operator that gives y normalizes the last axis of x, in float32."""
    node = y.producer()
    assert node is not None
    rank = len(rule.specs(x)[0].shape)
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    if axis not in {-1, rank - 1}:
        raise Reject(f"axis is {axis}, wanted the last of {rank}")
    stash = node.attributes["stash_type"].as_int() if "stash_type" in node.attributes else 1
    if stash != 1:
        raise Reject(f"stash_type is {stash}: the norm is not computed in float32")


def norm_epsilon(y: ir.Value) -> float:
    """Return the epsilon of the norm operator that gives y."""
    node = y.producer()
    assert node is not None
    epsilon = node.attributes.get("epsilon")
    return epsilon.as_float() if epsilon is not None else 1e-5


def _is_centred(x: ir.Value) -> bool:
    """Whether x is a - mean(a): then the chain is the middle of a LayerNorm."""
    node = x.producer()
    mean = node.inputs[1].producer() if node is not None and node.op_type == "Sub" and node.inputs[1] else None
    return mean is not None and mean.op_type == "ReduceMean" and node is not None and mean.inputs[0] is node.inputs[0]


class FuseRmsNorm(RulePass):
    """Root-mean-square norms."""

    name = "fuse-rms-norm"
    summary = "x * rsqrt(mean(x^2) + eps) * gamma -> RmsNorm"
    rules = (RmsNorm, RmsNormInFloat32, RmsNormalization)
