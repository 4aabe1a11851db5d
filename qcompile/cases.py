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
from qcompile.functions import FUSED_OPS

# Computed values above this many elements are tracked as shapes only; initializers above MAX_READ_ELEMENTS are not read.
MAX_KNOWN_ELEMENTS = 1 << 20
MAX_READ_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class Case:
    """One way of calling a decoder: B rows of S new tokens each, after a past of P cache columns.

    Attributes:
        name: Short name for reports.
        batch_size: B.
        sequence_length: S.
        past_length: P.
        lengths: Valid tokens per row among T = P + S, padded on the left; None means all T.
    """

    name: str
    batch_size: int
    sequence_length: int
    past_length: int
    lengths: tuple[int, ...] | None = None

    @property
    def total_length(self) -> int:
        """T = P + S."""
        return self.past_length + self.sequence_length

    def attention_mask(self) -> np.ndarray:
        """Return the padding mask, int64 [B, T]: 1 for a token, 0 for padding on the left."""
        lengths = self.lengths or (self.total_length,) * self.batch_size
        columns = np.arange(self.total_length)
        return (columns[None, :] >= self.total_length - np.array(lengths)[:, None]).astype(np.int64)

    def position_ids(self) -> np.ndarray:
        """Return positions as Hugging Face counts them, int64 [B, S]: tokens before, padding clipped to 0."""
        positions = np.maximum(self.attention_mask().cumsum(axis=1) - 1, 0)
        return np.asarray(positions[:, self.past_length :], dtype=np.int64)

    def causal_mask(self) -> np.ndarray:
        """Return which key column each query may see, bool [B, S, T]."""
        rows = np.arange(self.sequence_length)[:, None] + self.past_length
        causal = np.arange(self.total_length)[None, :] <= rows
        return np.asarray(causal[None] & (self.attention_mask()[:, None, :] == 1))


# Distinct numbers, so that a dimension seen equal in all of them is equal by construction and not by coincidence.
CASES: tuple[Case, ...] = (
    Case("prefill", 1, 7, 0),
    Case("prefill, batch 2 of different lengths", 2, 5, 0, (5, 3)),
    Case("decode with past", 1, 1, 11),
    Case("decode, batch 3 of different lengths", 3, 1, 13, (14, 6, 9)),
    Case("chunk after a past, batch 2", 2, 3, 17, (20, 16)),
)


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
    """The specs of every value of a graph in every case; kept up to date while passes rewrite the graph."""

    def __init__(self, model: ir.Model, cases: Sequence[Case] = CASES) -> None:
        self.model = model
        self.cases = tuple(cases)
        self._specs: list[dict[ir.Value, Spec | None]] = []
        for case in self.cases:
            specs = _input_specs(model.graph, case)
            self._specs.append(specs)
        for node in model.graph:
            self._evaluate(node)

    def spec(self, value: ir.Value, case_index: int) -> Spec | None:
        """Return the spec of a value in one case, or None when it could not be inferred."""
        specs = self._specs[case_index]
        if value not in specs and value.const_value is not None:
            specs[value] = _constant_spec(value)
        return specs.get(value)

    def specs(self, value: ir.Value) -> list[Spec] | None:
        """Return the spec of a value in every case, or None when any case does not know it."""
        found = [self.spec(value, index) for index in range(len(self.cases))]
        return None if any(spec is None for spec in found) else found  # type: ignore[return-value]

    def values(self, value: ir.Value) -> list[np.ndarray] | None:
        """Return the known value in every case, or None when it is an activation or unknown in some case."""
        specs = self.specs(value)
        if specs is None or any(spec.value is None for spec in specs):
            return None
        return [spec.value for spec in specs if spec.value is not None]

    def update(self, nodes: Iterable[ir.Node]) -> None:
        """Evaluate nodes that a rewrite has just added, in the order given (producers first)."""
        for node in nodes:
            self._evaluate(node)

    def alias(self, new: ir.Value, old: ir.Value) -> None:
        """Give `new` the specs of `old`: for a value that replaces another."""
        for specs in self._specs:
            specs[new] = specs.get(old)

    def _evaluate(self, node: ir.Node) -> None:
        for index in range(len(self.cases)):
            inputs = [None if v is None else self.spec(v, index) for v in node.inputs]
            missing = any(v is not None and s is None for v, s in zip(node.inputs, inputs, strict=True))
            outputs: Sequence[Spec | None] = [None] * len(node.outputs)
            if not missing:
                outputs = _node_specs(node, inputs, self.model)
            for value, spec in zip(node.outputs, outputs, strict=True):
                self._specs[index][value] = spec


def _input_specs(graph: ir.Graph, case: Case) -> dict[ir.Value, Spec | None]:
    dims = _DimBinding(case)
    return {value: _input_spec(value, case, dims) for value in graph.inputs}


def _input_spec(value: ir.Value, case: Case, dims: _DimBinding) -> Spec | None:
    dtype = value.dtype
    if dtype is None or value.shape is None:
        return None
    name = value.name or ""
    if name == "attention_mask":
        return Spec(dtype, (case.batch_size, case.total_length), case.attention_mask().astype(dtype.numpy()))
    if name == "position_ids":
        positions = case.position_ids()
        if value.shape[0] == 1:
            positions = positions[:1]
        return Spec(dtype, positions.shape, positions.astype(dtype.numpy()))
    if name == "input_ids":
        return Spec(dtype, (case.batch_size, case.sequence_length))
    if name.startswith("past_key_values."):
        fixed = tuple(int(d) if isinstance(d, int) else None for d in value.shape)
        if len(fixed) == 4 and fixed[1] is not None and fixed[3] is not None:
            return Spec(dtype, (case.batch_size, fixed[1], case.past_length, fixed[3]))
    return Spec(dtype, tuple(dims.bind(d) for d in value.shape))


class _DimBinding:
    """Numbers for symbolic dimensions of graphs whose inputs are not those of a decoder."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._bound: dict[str, int] = {}

    def bind(self, dim: int | ir.SymbolicDim) -> int:
        if isinstance(dim, int):
            return dim
        name = str(dim.value)
        if name not in self._bound:
            self._bound[name] = self._guess(name.lower(), len(self._bound))
        return self._bound[name]

    def _guess(self, name: str, count: int) -> int:
        case = self._case
        if "total" in name or ("past" in name and "+" in name):
            return case.total_length
        if "past" in name:
            return case.past_length
        if "batch" in name:
            return case.batch_size
        if "seq" in name:
            return case.sequence_length
        return case.batch_size + 2 * count + 1


def _constant_spec(value: ir.Value) -> Spec | None:
    tensor = value.const_value
    if tensor is None:
        return None
    shape = tuple(int(d) for d in tensor.shape.numpy())
    small = math.prod(shape) <= MAX_READ_ELEMENTS and tensor.dtype not in _OPAQUE_DTYPES
    return Spec(tensor.dtype, shape, tensor.numpy() if small else None)


_OPAQUE_DTYPES = {ir.DataType.STRING, ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.UNDEFINED}


def _node_specs(node: ir.Node, inputs: Sequence[Spec | None], model: ir.Model) -> Sequence[Spec | None]:
    unknown: list[Spec | None] = [None] * len(node.outputs)
    if any(a.type in {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS} for a in node.attributes.values()):
        return unknown
    if node.op_type in {"Shape", "Size"} and node.domain == "":
        return [_shape_of(node, inputs)]
    fused = FUSED_OPS.get(node.op_type) if node.domain == "qcompile" else None
    types = [None if s is None else (s.dtype, s.shape) for s in inputs]
    if fused is not None:
        return [Spec(dtype, shape) for dtype, shape in fused.infer(node, types)]
    if node.domain not in {"", "ai.onnx"}:
        return unknown
    opset = model.graph.opset_imports.get("", 18)
    if all(s is None or s.value is not None for s in inputs):
        known = single_op.evaluate(node, [None if s is None else s.value for s in inputs], opset)
        if known is not None and all(v.size <= MAX_KNOWN_ELEMENTS for v in known):
            return [Spec(ir.DataType.from_numpy(v.dtype), v.shape, v) for v in known]
    small = [None if s is None or s.num_elements > 1024 else s.value for s in inputs]
    inferred = single_op.infer(node, types, small, opset)
    return [None if t is None else Spec(*t) for t in inferred] if inferred is not None else unknown


def _shape_of(node: ir.Node, inputs: Sequence[Spec | None]) -> Spec | None:
    spec = inputs[0]
    if spec is None:
        return None
    if node.op_type == "Size":
        return Spec(ir.DataType.INT64, (), np.array(spec.num_elements, dtype=np.int64))
    start, end = node.attributes.get("start"), node.attributes.get("end")
    dims = spec.shape[start.as_int() if start else 0 : end.as_int() if end else None]
    return Spec(ir.DataType.INT64, (len(dims),), np.array(dims, dtype=np.int64))
