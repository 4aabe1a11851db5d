"""Fuse the split-halves rotary embedding into qcompile::RotaryEmbedding.

    y = x * cos + concat(-x[d/2:], x[:d/2]) * sin

x, y: float [B, N, S, d]; cos, sin: [B or 1, 1, S, d].
Source: Su et al. 2021, eq. 34, in the split-halves order of GPT-NeoX that Qwen uses.
"""

from __future__ import annotations

from qcompile.functions import ROTARY_EMBEDDING
from qcompile.passes.rule import FusionRule, Reject, RulePass, constant


class RotaryFromSlices(FusionRule):
    """rotate_half written with two Slices."""

    emits = ROTARY_EMBEDDING

    def pattern(self, op, x, cos, sin, first_start, first_end, second_start, second_end, axis, other_axis):
        second = op.Slice(x, second_start, second_end, other_axis, _allow_other_inputs=True)
        first = op.Slice(x, first_start, first_end, axis, _allow_other_inputs=True)
        rotated = op.Concat(op.Neg(second), first, axis=-1)
        return op.Add(op.Mul(x, cos), op.Mul(rotated, sin))

    def require(self, x, cos, sin, first_start, first_end, second_start, **_):
        half = _half(self, x)
        bounds = [int(constant(v, "a Slice bound").reshape(-1)[0]) for v in (first_start, first_end, second_start)]
        if bounds != [0, half, half]:
            raise Reject(f"the halves are cut at {bounds}, wanted [0, {half}, {half}]")
        _require_angles(self, x, cos, sin)

    def rewrite(self, op, x, cos, sin, **_):
        return self.emit(op, x, cos, sin)


class RotaryFromSplit(FusionRule):
    """rotate_half written with one Split."""

    emits = ROTARY_EMBEDDING

    def pattern(self, op, x, cos, sin):
        first, second = op.Split(x, _allow_other_inputs=True, _outputs=2)
        rotated = op.Concat(op.Neg(second), first, axis=-1)
        return op.Add(op.Mul(x, cos), op.Mul(rotated, sin))

    def require(self, x, cos, sin, **_):
        _half(self, x)
        _require_angles(self, x, cos, sin)

    def rewrite(self, op, x, cos, sin, **_):
        return self.emit(op, x, cos, sin)


def _half(rule: FusionRule, x) -> int:
    shapes = [spec.shape for spec in rule.specs(x)]
    if len(shapes[0]) != 4:
        raise Reject(f"'{x.name}' has rank {len(shapes[0])}, wanted [B N S d]")
    return shapes[0][-1] // 2


def _require_angles(rule: FusionRule, x, cos, sin) -> None:
    for angles in (cos, sin):
        for a, b in zip(rule.specs(x), rule.specs(angles), strict=True):
            batch, _, length, head = a.shape
            if b.shape not in {(batch, 1, length, head), (1, 1, length, head)}:
                raise Reject(f"'{angles.name}' is {list(b.shape)}, wanted [{batch} or 1, 1, {length}, {head}]")


class FuseRotaryEmbedding(RulePass):
    """Rotary position embeddings of queries and keys."""

    name = "fuse-rotary-embedding"
    summary = "x * cos + rotate_half(x) * sin -> RotaryEmbedding"
    rules = (RotaryFromSlices, RotaryFromSplit)
