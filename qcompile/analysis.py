"""Concrete evaluation of a graph's shapes and control values over a handful of cases.

Exporters spell shapes, masks and positions in many ways (Shape-Gather-Concat chains, Range, Expand, Where, …). Instead
of matching those spellings, a graph is interpreted once per `Case` (prefill, decode with past, ragged batches, a chunk
after a past): every value becomes a `Spec`, its dtype and concrete shape, and for everything that hangs only on
attention_mask, position_ids, shapes and small constants also its value. Activations (whatever depends on input_ids, the
KV cache or large weights) stay shapes without values, so no weight is read and a 7B model costs as little as a toy.

Rules ask: "is this shape input always [B, S, H, d]?", "is this mask exactly causal and padding?". The same specs give
the random feeds on which every rewrite is proved (`qcompile.passes.proof`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile import single_op
from qcompile.cases import Case, DimBinding, cases_for, input_array, input_shape
from qcompile.functions import DOMAIN, FUSED_OPS
from qcompile.tensors import StreamedTensor

# Computed values above this many elements are tracked as shapes only; initializers above MAX_READ_ELEMENTS are not read.
MAX_KNOWN_ELEMENTS = 1 << 20
MAX_READ_ELEMENTS = 1 << 18
_MAX_SHAPE_ELEMENTS = 1024
_OPAQUE_DTYPES = {ir.DataType.STRING, ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.UNDEFINED}
_STANDARD_DOMAINS = {"", "ai.onnx"}


@dataclass(frozen=True, eq=False)
class Spec:
    """What one case says of one value: dtype, concrete shape, and the value itself where it is control data."""

    dtype: ir.DataType
    shape: tuple[int, ...]
    value: np.ndarray | None = None

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Analysis:
    """The specs of the values of a graph in every case, found when asked for; passes may rewrite the graph meanwhile."""

    def __init__(self, model: ir.Model, cases: Sequence[Case] | None = None) -> None:
        self.model = model
        self.cases: tuple[Case, ...] = cases_for(model.graph) if cases is None else tuple(cases)
        self._specs: dict[ir.Value, tuple[Spec | None, ...]] = {}
        dims = [DimBinding(case) for case in self.cases]
        for value in model.graph.inputs:
            if value.const_value is None:
                self._specs[value] = tuple(_input_spec(value, c, d) for c, d in zip(self.cases, dims, strict=True))

    def spec(self, value: ir.Value, case_index: int) -> Spec | None:
        """Return the spec of a value in one case, or None when it could not be inferred."""
        return self._all(value)[case_index]

    def specs(self, value: ir.Value) -> list[Spec] | None:
        """Return the spec of a value in every case, or None when any case does not know it."""
        found = [spec for spec in self._all(value) if spec is not None]
        return found if len(found) == len(self.cases) else None

    def values(self, value: ir.Value) -> list[np.ndarray] | None:
        """Return the known value in every case, or None when it is an activation or unknown in some case."""
        found = [spec.value for spec in self._all(value) if spec is not None and spec.value is not None]
        return found if len(found) == len(self.cases) else None

    def update(self, nodes: Iterable[ir.Node]) -> None:
        """Forget what was known of these nodes' outputs: they are new, or their inputs have changed."""
        for node in nodes:
            for value in node.outputs:
                self._specs.pop(value, None)

    def alias(self, new: ir.Value, old: ir.Value) -> None:
        """Give `new` the specs of `old`: for a value that replaces another."""
        self._specs[new] = self._all(old)

    def _all(self, value: ir.Value) -> tuple[Spec | None, ...]:
        if value not in self._specs:
            self._resolve(value)
        return self._specs[value]

    def _resolve(self, value: ir.Value) -> None:
        """Evaluate the producer of a value after those of its inputs; an explicit stack, as graphs are deep."""
        stack = [value]
        while stack:
            current = stack[-1]
            if current in self._specs:
                stack.pop()
                continue
            node = current.producer()
            if current.const_value is not None or node is None:
                self._specs[current] = (_constant_spec(current),) * len(self.cases)
                continue
            missing = [v for v in node.inputs if v is not None and v not in self._specs]
            stack.extend(missing)
            if not missing:
                self._evaluate(node)

    def _evaluate(self, node: ir.Node) -> None:
        found: list[Sequence[Spec | None]] = []
        question = _Question(node, self.model)
        for index in range(len(self.cases)):
            inputs = [None if v is None else self._specs[v][index] for v in node.inputs]
            missing = any(v is not None and s is None for v, s in zip(node.inputs, inputs, strict=True))
            found.append([None] * len(node.outputs) if missing else question.answer(inputs))
        for value, specs in zip(node.outputs, zip(*found, strict=True), strict=True):
            self._specs[value] = specs


class _Question:
    """One node asked for its output specs, case after case."""

    def __init__(self, node: ir.Node, model: ir.Model) -> None:
        self.node = node
        opset = model.graph.opset_imports.get("", model.graph.opset_imports.get("ai.onnx", 18))
        self.op = single_op.SingleOp(node, opset) if node.domain in _STANDARD_DOMAINS else None
        self.fused = FUSED_OPS.get(node.op_type) if node.domain == DOMAIN else None
        has_subgraph = any(
            a.type in {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS} for a in node.attributes.values()
        )
        self.is_opaque = has_subgraph or (self.op is None and self.fused is None)

    def answer(self, inputs: Sequence[Spec | None]) -> Sequence[Spec | None]:
        """Return the spec of each output; None where it cannot be told."""
        node = self.node
        types = [None if s is None else (s.dtype, s.shape) for s in inputs]
        if self.is_opaque:
            return [None] * len(node.outputs)
        if self.fused is not None:
            return self._infer_fused(types)
        assert self.op is not None
        if node.op_type in {"Shape", "Size"}:
            return [_shape_of(node, inputs)]
        if node.op_type == "CastLike":
            return [_cast_like(*inputs)]
        if all(s is None or s.value is not None for s in inputs):
            known = self._evaluate(inputs, types)
            if known is not None:
                return [Spec(ir.DataType.from_numpy(v.dtype), v.shape, v) for v in known]
        inferred = self._infer(inputs, types)
        return [None if t is None else Spec(*t) for t in inferred] if inferred else [None] * len(node.outputs)

    def _infer_fused(self, types: Sequence[single_op.TensorType | None]) -> Sequence[Spec | None]:
        assert self.fused is not None
        try:
            found = [Spec(dtype, shape) for dtype, shape in self.fused.infer(self.node, types)]
        except (IndexError, ValueError):  # an input is absent, or of another rank
            found = []
        count = len(self.node.outputs)
        return [*found[:count], *[None] * (count - len(found))]

    def _infer(
        self, inputs: Sequence[Spec | None], types: Sequence[single_op.TensorType | None]
    ) -> list[single_op.TensorType | None] | None:
        assert self.op is not None
        small = [None if s is None or s.num_elements > _MAX_SHAPE_ELEMENTS else s.value for s in inputs]
        return self.op.infer(types, small)

    def _evaluate(
        self, inputs: Sequence[Spec | None], types: Sequence[single_op.TensorType | None]
    ) -> list[np.ndarray] | None:
        """Compute the outputs, unless inference says that they are large."""
        assert self.op is not None
        largest = max((s.num_elements for s in inputs if s is not None), default=0)
        if largest > _MAX_SHAPE_ELEMENTS or self.node.op_type in single_op.GROWING_OPS:
            inferred = self._infer(inputs, types) or []
            if any(t is not None and math.prod(t[1]) > MAX_KNOWN_ELEMENTS for t in inferred):
                return None
        known = self.op.evaluate([None if s is None else s.value for s in inputs])
        return known if known is not None and all(v.size <= MAX_KNOWN_ELEMENTS for v in known) else None


def _input_spec(value: ir.Value, case: Case, dims: DimBinding) -> Spec | None:
    shape = input_shape(value, case, dims)
    if value.dtype is None or shape is None:
        return None
    return Spec(value.dtype, shape, input_array(value, case, shape))


def _constant_spec(value: ir.Value) -> Spec | None:
    tensor = value.const_value
    if tensor is None:
        return None
    shape = tuple(int(d) for d in tensor.shape.numpy())
    # what is computed while the model is saved is not computed before
    small = math.prod(shape) <= MAX_READ_ELEMENTS and not isinstance(tensor, StreamedTensor)
    small = small and tensor.dtype not in _OPAQUE_DTYPES
    return Spec(tensor.dtype, shape, tensor.numpy() if small else None)


def _cast_like(value: Spec | None, like: Spec | None) -> Spec | None:
    """CastLike looks at the dtype of its second input only: a constant stays one beside an activation."""
    if value is None or like is None:
        return None
    array = value.value.astype(like.dtype.numpy()) if value.value is not None else None
    return Spec(like.dtype, value.shape, array)


def _shape_of(node: ir.Node, inputs: Sequence[Spec | None]) -> Spec | None:
    spec = inputs[0]
    if spec is None:
        return None
    if node.op_type == "Size":
        return Spec(ir.DataType.INT64, (), np.array(spec.num_elements, dtype=np.int64))
    start, end = node.attributes.get("start"), node.attributes.get("end")
    dims = spec.shape[start.as_int() if start else 0 : end.as_int() if end else None]
    return Spec(ir.DataType.INT64, (len(dims),), np.array(dims, dtype=np.int64))
