"""Fuse LayerNormalization, or the primitive chain of it, into qcompile::LayerNorm.

    y = (x - mean(x)) * rsqrt(mean((x - mean(x))^2) + eps) * gamma + beta

x, y: float [..., D]; gamma, beta: [D]; eps: constant scalar.
Source: Ba et al. 2016, eq. 4.
"""

from __future__ import annotations

from qcompile.functions import LAYER_NORM
from qcompile.passes.rule import FusionRule, Reject, RulePass, constant, require_row_weight, scalar


class LayerNormChain(FusionRule):
    """The chain of primitive operators."""

    emits = LAYER_NORM

    def pattern(self, op, x, gamma, beta, eps):
        centred = op.Sub(x, op.ReduceMean(x, [-1], keepdims=1))
        variance = op.ReduceMean(op.Mul(centred, centred), [-1], keepdims=1)
        normal = op.Mul(centred, op.Reciprocal(op.Sqrt(op.Add(variance, eps))))
        return op.Add(op.Mul(normal, gamma), beta)

    def require(self, x, gamma, beta, eps, **_):
        scalar(eps, "epsilon")
        require_row_weight(self, x, gamma, "gamma")
        require_row_weight(self, x, beta, "beta")

    def rewrite(self, op, x, gamma, beta, eps, **_):
        return self.emit(op, x, gamma, beta, epsilon=scalar(eps))


class LayerNormalization(FusionRule):
    """The standard operator of opset 17 and later."""

    emits = LAYER_NORM

    def pattern(self, op, x, gamma, beta):
        return op.LayerNormalization(x, gamma, beta, _outputs=["y"])

    def require(self, x, gamma, beta, y, **_):
        attributes = y.producer().attributes
        rank = len(self.specs(x)[0].shape)
        axis = attributes["axis"].as_int() if "axis" in attributes else -1
        if axis not in {-1, rank - 1}:
            raise Reject(f"axis is {axis}, wanted the last of {rank}")
        if "stash_type" in attributes and attributes["stash_type"].as_int() != 1:
            raise Reject(f"stash_type is {attributes['stash_type'].as_int()}: the norm is not computed in float32")
        constant(gamma, "gamma")
        if beta is None:
            raise Reject("no beta")
        require_row_weight(self, x, beta, "beta")

    def rewrite(self, op, x, gamma, beta, y, **_):
        epsilon = y.producer().attributes.get("epsilon")
        return self.emit(op, x, gamma, beta, epsilon=epsilon.as_float() if epsilon is not None else 1e-5)


class FuseLayerNorm(RulePass):
    """Layer norms."""

    name = "fuse-layer-norm"
    summary = "(x - mean) / sqrt(var + eps) * gamma + beta -> LayerNorm"
    rules = (LayerNormChain, LayerNormalization)
