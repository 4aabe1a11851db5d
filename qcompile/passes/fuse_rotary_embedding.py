"""Fuse the split-halves rotary embedding into qcompile::RotaryEmbedding.

    y = x * cos + concat(-x[d/2:], x[:d/2]) * sin

x, y: float [B, N, S, d]; cos, sin: [B or 1, 1, S, d].
Source: Su et al. 2021, eq. 34, in the split-halves order of GPT-NeoX that Qwen uses.
"""

from __future__ import annotations

import abc
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.functions import ROTARY_EMBEDDING
from qcompile.passes.change import named_constant
from qcompile.passes.rule import FusionRule, Reject, RulePass, constant


class RotaryChain(FusionRule):
    """The chain of primitive operators around two halves of x, however they were cut."""

    emits = ROTARY_EMBEDDING
    landmark = "Neg"

    def require(self, x: ir.Value, cos: ir.Value, sin: ir.Value, **_: Any) -> None:
        _half(self, x)
        for angles in (cos, sin):
            for a, b in zip(self.specs(x), self.specs(angles), strict=True):
                batch, _heads, length, head = a.shape
                if b.shape not in {(batch, 1, length, head), (1, 1, length, head)}:
                    raise Reject(f"'{angles.name}' is {list(b.shape)}, wanted [{batch} or 1, 1, {length}, {head}]")

    def rewrite(self, op: Any, x: ir.Value, cos: ir.Value, sin: ir.Value, **_: Any) -> Any:
        return self.emit(op, x, cos, sin)


class RotaryFromSlices(RotaryChain):
    """rotate_half written with two Slices."""

    def pattern(
        self,
        op: Any,
        x: Any,
        cos: Any,
        sin: Any,
        first_start: Any,
        first_end: Any,
        second_start: Any,
        second_end: Any,
        first_axis: Any,
        second_axis: Any,
    ) -> Any:
        second = op.Slice(x, second_start, second_end, second_axis, _allow_other_inputs=True)
        first = op.Slice(x, first_start, first_end, first_axis, _allow_other_inputs=True)
        return rotated(op, x, first, second, cos, sin)

    def require(self, x: ir.Value, cos: ir.Value, sin: ir.Value, **bindings: Any) -> None:
        super().require(x, cos, sin)
        half = _half(self, x)
        bounds = [_bound(bindings[name]) for name in ("first_start", "first_end", "second_start")]
        if bounds != [0, half, half]:
            raise Reject(f"the halves are cut at {bounds}, wanted [0, {half}, {half}]")


class RotaryFromSplit(RotaryChain):
    """rotate_half written with one Split."""

    def pattern(self, op: Any, x: Any, cos: Any, sin: Any) -> Any:
        first, second = op.Split(x, _allow_other_inputs=True, _outputs=["first", "second"])
        return rotated(op, x, first, second, cos, sin)

    def require(self, x: ir.Value, cos: ir.Value, sin: ir.Value, **bindings: Any) -> None:
        super().require(x, cos, sin)
        half = _half(self, x)
        sizes = [self.specs(bindings[name])[0].shape[-1] for name in ("first", "second")]
        if sizes != [half, half]:
            raise Reject(f"x is cut into {sizes}, wanted [{half}, {half}]")


class RotaryOperatorRule(FusionRule):
    """RotaryEmbedding of opset 23 on split halves of the whole head."""

    emits = ROTARY_EMBEDDING
    landmark = "RotaryEmbedding"

    def require(self, x: ir.Value, cos: ir.Value, sin: ir.Value, y: ir.Value, **_: Any) -> None:
        half = _whole_head(self, x, y)
        for angles in (cos, sin):
            self.require_angles(x, angles, half)

    @abc.abstractmethod
    def require_angles(self, x: ir.Value, angles: ir.Value, half: int) -> None:
        """Reject unless cos or sin is laid out as the operator wants it."""

    def both_halves(self, op: Any, half: ir.Value) -> Any:
        """Return [B, 1, S, d] from [B, S, d/2]; queries and keys share it."""
        for concat, _ in half.uses():
            if concat.op_type == "Concat" and list(concat.inputs) == [half, half] and concat.graph is not None:
                for unsqueeze, _ in concat.outputs[0].uses():
                    if unsqueeze.op_type == "Unsqueeze" and self.analysis.values(unsqueeze.outputs[0]) is not None:
                        return unsqueeze.outputs[0]
        axis = named_constant(self.model.graph, "axes.1", np.array([1], dtype=np.int64))
        return op.Unsqueeze(op.Concat(half, half, axis=-1), axis)


class RotaryOperator(RotaryOperatorRule):
    """With cos and sin [B, S, d/2]."""

    def pattern(self, op: Any, x: Any, cos: Any, sin: Any) -> Any:
        return op.RotaryEmbedding(x, cos, sin, _outputs=["y"])

    def require_angles(self, x: ir.Value, angles: ir.Value, half: int) -> None:
        for a, b in zip(self.specs(x), self.specs(angles), strict=True):
            if b.shape not in {(a.shape[0], a.shape[2], half), (1, a.shape[2], half)}:
                raise Reject(f"'{angles.name}' is {list(b.shape)}, wanted [{a.shape[0]}, {a.shape[2]}, {half}]")

    def rewrite(self, op: Any, x: ir.Value, cos: ir.Value, sin: ir.Value, **_: Any) -> Any:
        return self.emit(op, x, *(self.both_halves(op, angles) for angles in (cos, sin)))


class RotaryOperatorByPosition(RotaryOperatorRule):
    """With tables [positions, d/2] and position_ids [B, S]."""

    def pattern(self, op: Any, x: Any, cos: Any, sin: Any, positions: Any) -> Any:
        return op.RotaryEmbedding(x, cos, sin, positions, _outputs=["y"])

    def require_angles(self, x: ir.Value, angles: ir.Value, half: int) -> None:
        shape = self.specs(angles)[0].shape
        if len(shape) != 2 or shape[1] != half:
            raise Reject(f"'{angles.name}' is {list(shape)}, wanted [positions, {half}]")

    def rewrite(self, op: Any, x: ir.Value, cos: ir.Value, sin: ir.Value, positions: ir.Value, **_: Any) -> Any:
        rows = (op.Gather(table, positions, axis=0) for table in (cos, sin))
        return self.emit(op, x, *(self.both_halves(op, half) for half in rows))


def rotated(op: Any, x: Any, first: Any, second: Any, cos: Any, sin: Any) -> Any:
    """The canonical chain: x * cos + [-second half, first half] * sin."""
    return op.Add(op.Mul(x, cos), op.Mul(op.Concat(op.Neg(second), first, axis=-1), sin))


def _whole_head(rule: FusionRule, x: ir.Value, y: ir.Value) -> int:
    """Return d/2 of the RotaryEmbedding that gives y; Reject unless it rotates split halves of the whole head."""
    half = _half(rule, x)
    node = y.producer()
    assert node is not None
    interleaved = node.attributes.get("interleaved")
    if interleaved is not None and interleaved.as_int():
        raise Reject("it is interleaved: Qwen rotates split halves")
    size = node.attributes.get("rotary_embedding_dim")
    if size is not None and size.as_int() not in {0, 2 * half}:
        raise Reject(f"it rotates {size.as_int()} of {2 * half} dimensions")
    return half


def _bound(value: ir.Value) -> int:
    array = constant(value, "a Slice bound")
    if array.size != 1:
        raise Reject(f"a Slice bound has {array.size} elements, wanted one")
    return int(array.reshape(()))


def _half(rule: FusionRule, x: ir.Value) -> int:
    shapes = [spec.shape for spec in rule.specs(x)]
    if len(shapes[0]) != 4:
        raise Reject(f"'{x.name}' has rank {len(shapes[0])}, wanted [B N S d]")
    if shapes[0][-1] % 2:
        raise Reject(f"the head dimension {shapes[0][-1]} is odd")
    return shapes[0][-1] // 2


class FuseRotaryEmbedding(RulePass):
    """Rotary position embeddings of queries and keys."""

    name = "fuse-rotary-embedding"
    summary = "x * cos + rotate_half(x) * sin -> RotaryEmbedding"
    rules = (RotaryFromSlices, RotaryFromSplit, RotaryOperator, RotaryOperatorByPosition)
