"""Prove one rewrite: run the nodes that go and the nodes that come on the same inputs and compare.

Activations are random, weights are the model's own, masks and positions are what each case really gives. Both sides run
on ONNX Runtime without its optimizers. Weights and activations are inputs of the two small models, so the models of all
layers are the same bytes and one session per structure serves them all.

float16 and bfloat16 graphs are proved in float32 (every tensor widened, which is exact): the algebra is held to the
float32 limit, and ONNX Runtime's CPU has no bfloat16 kernels. That a rewrite keeps its Casts is the rules' business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.cases import CASES, Analysis, Case, Spec
from qcompile.functions import DOMAIN, FUSED_OPS
from qcompile.ort import run_session

# Relative to the largest output: float32 sums of a few thousand terms in another order differ by some 1e-6.
MAX_RELATIVE_ERROR = 2e-5
_EMBEDDED_ELEMENTS = 64
_HALF = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


@dataclass(frozen=True)
class Proof:
    """The outcome: `error` is the largest |before - after| over max |before|; `reason` is empty when it holds."""

    error: float
    reason: str = ""

    @property
    def holds(self) -> bool:
        """Whether both sides agreed in every case."""
        return not self.reason


@dataclass(frozen=True)
class Rewrite:
    """Nodes that go and nodes that come, with the values that stand for each other."""

    old_nodes: Sequence[ir.Node]
    old_outputs: Sequence[ir.Value]
    new_nodes: Sequence[ir.Node]
    new_outputs: Sequence[ir.Value]


@dataclass
class Prover:
    """Compares rewrites; keeps one session per structure.

    Attributes:
        seed: Seed of the random activations.
        limit: Largest relative error that passes.
    """

    seed: int = 0
    limit: float = MAX_RELATIVE_ERROR
    _sessions: dict[bytes, Any] = field(default_factory=dict)

    def prove(self, rewrite: Rewrite, analysis: Analysis, *, rows_that_matter: bool = False) -> Proof:
        """Compare both sides of a rewrite in every case.

        Args:
            rewrite: The two sides.
            analysis: Specs of the values around them.
            rows_that_matter: Compare only [B, S] rows that are tokens: what padding computes is nobody's business.
        """
        old = _Side.of(rewrite.old_nodes, rewrite.old_outputs)
        new = _Side.of(rewrite.new_nodes, rewrite.new_outputs)
        boundary = list(dict.fromkeys([*old.inputs, *new.inputs]))
        worst = 0.0
        for index, case in enumerate(CASES):
            feeds = self._feeds(boundary, analysis, index)
            if isinstance(feeds, str):
                return Proof(worst, feeds)
            before = self._run(old, feeds)
            after = self._run(new, feeds)
            rows = case.attention_mask()[:, case.past_length :] == 1 if rows_that_matter else None
            for old_array, new_array in zip(before, after, strict=True):
                error, reason = _difference(old_array, new_array, rows)
                worst = max(worst, error)
                if reason or error > self.limit:
                    return Proof(worst, f"{case.name}: " + (reason or f"relative error {error:.2g} > {self.limit:.2g}"))
        return Proof(worst)

    def run(self, model_bytes: bytes, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Run a small model, keeping its session."""
        return run_session(self._sessions, model_bytes, feeds)

    def _feeds(self, boundary: Sequence[ir.Value], analysis: Analysis, index: int) -> dict[ir.Value, np.ndarray] | str:
        feeds = {}
        for position, value in enumerate(boundary):
            if value.const_value is not None:
                feeds[value] = _widen(value.const_value.numpy())
                continue
            spec = analysis.spec(value, index)
            if spec is None:
                return f"the shape of '{value.name}' could not be inferred, so the rewrite cannot be proved"
            feeds[value] = _feed(spec, np.random.default_rng([self.seed, index, position]))
        return feeds

    def _run(self, side: _Side, feeds: dict[ir.Value, np.ndarray]) -> list[np.ndarray]:
        proto = side.model_bytes(feeds)
        return run_session(self._sessions, proto, {f"v{i}": feeds[v] for i, v in enumerate(side.fed)})


@dataclass
class _Side:
    """One side of a rewrite as a model of its own."""

    nodes: list[ir.Node]
    inputs: list[ir.Value]
    outputs: list[ir.Value]

    @classmethod
    def of(cls, nodes: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> _Side:
        ordered = sort_nodes(nodes)
        produced = {v for n in ordered for v in n.outputs}
        used = [v for n in ordered for v in n.inputs if v is not None and v not in produced]
        used += [v for v in outputs if v not in produced]
        return cls(ordered, list(dict.fromkeys(used)), list(outputs))

    @property
    def fed(self) -> list[ir.Value]:
        return [v for v in self.inputs if not _is_embedded(v)]

    def model_bytes(self, feeds: dict[ir.Value, np.ndarray]) -> bytes:
        """Serialize with neutral names; small constants inside, everything else as inputs of any shape."""
        values: dict[ir.Value | None, ir.Value | None] = {None: None}
        inputs, initializers = [], []
        for value in self.inputs:
            array = feeds[value]
            if _is_embedded(value):
                inner = ir.Value(name=f"c{len(initializers)}", const_value=ir.tensor(array))
                initializers.append(inner)
            else:
                dtype = ir.DataType.from_numpy(array.dtype)
                dims = [None] * array.ndim
                inner = ir.Value(name=f"v{len(inputs)}", type=ir.TensorType(dtype), shape=ir.Shape(dims))
                inputs.append(inner)
            values[value] = inner
        nodes = [_copy_node(node, values, i) for i, node in enumerate(self.nodes)]
        outputs = [ir.Value(name=f"y{i}") for i in range(len(self.outputs))]
        for outer, value in zip(outputs, self.outputs, strict=True):
            nodes.append(ir.Node("", "Identity", [values[value]], outputs=[outer]))
        imports = {"": 18, DOMAIN: 1, "com.microsoft": 1}
        graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=initializers, opset_imports=imports, name="side")
        called = {n.op_type for n in self.nodes if n.domain == DOMAIN}
        functions = [FUSED_OPS[name].function for name in sorted(called)]
        model = ir.Model(graph, ir_version=10, functions=functions)
        return bytes(ir.to_proto(model).SerializeToString())


def sort_nodes(nodes: Sequence[ir.Node]) -> list[ir.Node]:
    """Return the nodes with producers before consumers."""
    todo = dict.fromkeys(nodes)
    ordered: list[ir.Node] = []
    done: set[ir.Node] = set()

    def visit(node: ir.Node) -> None:
        if node in done:
            return
        done.add(node)
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if producer is not None and producer in todo:
                visit(producer)
        ordered.append(node)

    for node in todo:
        visit(node)
    return ordered


def _is_embedded(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and tensor.size <= _EMBEDDED_ELEMENTS


def _copy_node(node: ir.Node, values: dict[ir.Value | None, ir.Value | None], index: int) -> ir.Node:
    outputs = [ir.Value(name=f"n{index}_{i}") for i in range(len(node.outputs))]
    attributes = [_widen_attribute(node, a) for a in node.attributes.values()]
    inputs = [values[v] for v in node.inputs]
    copy = ir.Node(node.domain, node.op_type, inputs, attributes, outputs=outputs, name=f"n{index}")
    values.update(zip(node.outputs, outputs, strict=True))
    return copy


def _widen_attribute(node: ir.Node, attribute: ir.Attr) -> ir.Attr:
    if node.op_type == "Cast" and attribute.name == "to" and ir.DataType(attribute.as_int()) in _HALF:
        return ir.AttrInt64("to", int(ir.DataType.FLOAT))
    if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in _HALF:
        return ir.AttrTensor(attribute.name, ir.tensor(_widen(attribute.as_tensor().numpy())))
    return attribute


def _widen(array: np.ndarray) -> np.ndarray:
    """Return float16 and bfloat16 as float32, anything else as it is."""
    if array.dtype == np.float16 or array.dtype.name == "bfloat16":
        return array.astype(np.float32)
    return array


def _feed(spec: Spec, rng: np.random.Generator) -> np.ndarray:
    if spec.value is not None:
        return _widen(spec.value)
    dtype = np.dtype(np.float32) if spec.dtype in _HALF else spec.dtype.numpy()
    if dtype.kind == "f":
        return rng.standard_normal(spec.shape).astype(dtype)
    return rng.integers(0, 2, spec.shape).astype(dtype)


def _difference(before: np.ndarray, after: np.ndarray, rows: np.ndarray | None) -> tuple[float, str]:
    if before.shape != after.shape:
        return 0.0, f"shapes differ, {before.shape} before and {after.shape} after"
    if rows is not None and before.shape[:2] == rows.shape:
        before, after = before[rows], after[rows]
    if before.size == 0:
        return 0.0, ""
    if before.dtype.kind != "f":
        return 0.0, "" if np.array_equal(before, after) else "values differ"
    if not np.array_equal(np.isfinite(before), np.isfinite(after)):
        return 0.0, "not the same values are finite"
    finite = np.isfinite(before)
    scale = max(float(np.abs(before[finite]).max(initial=0.0)), 1e-30)
    return float(np.abs(before[finite] - after[finite]).max(initial=0.0)) / scale, ""


__all__ = ["CASES", "Case", "Proof", "Prover", "Rewrite", "sort_nodes"]
