"""Prove one rewrite: run the nodes that go and the nodes that come on the same inputs and compare.

Activations are random, weights are the model's own, masks and positions are what each case really gives. Both sides run
on ONNX Runtime without its optimizers. Weights and activations are inputs of the two small models, so the models of all
layers are the same bytes and one session per structure serves them all.

float16 and bfloat16 graphs are proved in float32 (every tensor widened, which is exact): the algebra is held to the
float32 limit, and ONNX Runtime's CPU has no bfloat16 kernels. That a rewrite keeps its precision is checked apart
(`qcompile.passes.precision`).

Memory follows the weights of one side: those of the nodes that go are released before the others are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.analysis import Analysis, Spec
from qcompile.cases import Case
from qcompile.functions import MIN_OPSET
from qcompile.ort import run_session
from qcompile.passes.excerpt import HALF, model_of, outer_values, sort_nodes
from qcompile.weights import rows_of

# Relative to the largest output: float32 sums of a few thousand terms in another order differ by some 1e-6.
MAX_RELATIVE_ERROR = 2e-5
# The same where a half-precision constant (sqrt 2 of a GELU) stands for the number itself: one rounding to its dtype.
MAX_LITERAL_ERROR = {ir.DataType.FLOAT16: 1e-3, ir.DataType.BFLOAT16: 8e-3}
_SMALLEST = 1e-30
_EMBEDDED_ELEMENTS = 64
_PIECE_ELEMENTS = 8 << 20
_MAX_DRAWN_ELEMENTS = 1 << 27


@dataclass(frozen=True)
class Proof:
    """The outcome: `error` is the largest |before - after| over max |before|; `reason` is empty when it holds.

    Where everything before is 0, the error is relative to the prover's `step`.
    """

    error: float
    reason: str = ""

    @property
    def holds(self) -> bool:
        """Whether both sides agreed in every case."""
        return not self.reason


@dataclass(frozen=True)
class Rewrite:
    """Nodes that go and nodes that come, with the values that stand for each other.

    Attributes:
        old_nodes: The nodes that go.
        old_outputs: What others read of them.
        new_nodes: The nodes that come.
        new_outputs: What others will read instead, in the same order.
        opsets: Of the two sides; by default both are of the graph's opset.
    """

    old_nodes: Sequence[ir.Node]
    old_outputs: Sequence[ir.Value]
    new_nodes: Sequence[ir.Node]
    new_outputs: Sequence[ir.Value]
    opsets: tuple[int, int] | None = None


@dataclass
class Prover:
    """Compares rewrites; keeps one session per structure.

    Attributes:
        seed: Seed of the random activations.
        limit: Largest relative error that passes.
        embeds_weights: Put weights inside the small models, as a loaded model has them: kernels that pack their
            weights at load (MatMulNBits) compute differently when the weight is an input.
        step: What errors are relative to where all outputs are 0, for activations of magnitude 1: a kernel that takes the
            sum of 128 * x from that of (code + 128) * x leaves a rounding error that only a scale can be compared with.
    """

    seed: int = 0
    limit: float = MAX_RELATIVE_ERROR
    embeds_weights: bool = False
    step: float = _SMALLEST
    _sessions: dict[bytes, Any] = field(default_factory=dict)

    def prove(
        self,
        rewrite: Rewrite,
        analysis: Analysis,
        *,
        rows_that_matter: bool = False,
        rounds_literals: bool = False,
    ) -> Proof:
        """Compare both sides of a rewrite in every case.

        Args:
            rewrite: The two sides.
            analysis: Specs of the values around them.
            rows_that_matter: Compare only [B, S] rows that are tokens: what padding computes is nobody's business.
            rounds_literals: Numbers that stood as constants of the graph's dtype are now exact, or the reverse.
        """
        old = _Side.of(rewrite.old_nodes, rewrite.old_outputs, self.embeds_weights)
        new = _Side.of(rewrite.new_nodes, rewrite.new_outputs, self.embeds_weights)
        cases = [(index, case) for index, case in enumerate(analysis.cases) if case.is_proved]
        if not cases:
            return Proof(0.0, "the graph's fixed dimensions are too large to prove rewrites on; export them dynamic")
        activations = [a for a in dict.fromkeys([*old.inputs, *new.inputs]) if a.const_value is None]
        feeds = []
        for index, case in cases:
            drawn = self._draw(activations, analysis, index, case)
            if isinstance(drawn, str):
                return Proof(0.0, drawn)
            feeds.append(drawn)
        limit = max(self.limit, self._literal_limit(old.inputs) if rounds_literals else 0.0)
        imports = analysis.model.graph.opset_imports
        opset = imports.get("", MIN_OPSET)
        opsets = rewrite.opsets or (opset, opset)
        before = self._run(old, feeds, {**imports, "": opsets[0]})
        after = self._run(new, feeds, {**imports, "": opsets[1]})
        compared = [case for _, case in cases]
        return _compare(compared, before, after, limit, self.step, rows_that_matter=rows_that_matter)

    def run(self, model_bytes: bytes, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Run a small model, keeping its session."""
        return run_session(self._sessions, model_bytes, feeds)

    def _draw(
        self, activations: Sequence[ir.Value], analysis: Analysis, index: int, case: Case
    ) -> dict[ir.Value, np.ndarray] | str:
        feeds = {}
        for position, value in enumerate(activations):
            spec = analysis.spec(value, index)
            if spec is None:
                return f"the shape of '{value.name}' could not be inferred, so the rewrite cannot be proved"
            if spec.num_elements > _MAX_DRAWN_ELEMENTS:
                return f"'{value.name}' is {list(spec.shape)} in {case.name}, too large to prove the rewrite"
            feeds[value] = _feed(spec, case.magnitude, np.random.default_rng([self.seed, index, position]))
        return feeds

    def _run(
        self, side: _Side, feeds: Sequence[dict[ir.Value, np.ndarray]], imports: dict[str, int]
    ) -> list[list[np.ndarray]]:
        """Run one side in every case; its weights are read once and let go at the end."""
        weights = {v: _widened(v.const_value) for v in side.inputs if v.const_value is not None}
        model_bytes = side.model_bytes(weights | feeds[0], imports)
        names = {v: f"v{i}" for i, v in enumerate(side.fed)}
        shared = {names[v]: array for v, array in weights.items() if v in names}
        return [
            self.run(model_bytes, shared | {names[v]: array for v, array in drawn.items() if v in names})
            for drawn in feeds
        ]

    @staticmethod
    def _literal_limit(inputs: Sequence[ir.Value]) -> float:
        dtypes = {v.const_value.dtype for v in inputs if v.const_value is not None and v.const_value.size == 1}
        return max((MAX_LITERAL_ERROR.get(dtype, 0.0) for dtype in dtypes), default=0.0)


@dataclass
class _Side:
    """One side of a rewrite as a model of its own."""

    nodes: list[ir.Node]
    inputs: list[ir.Value]
    outputs: list[ir.Value]
    embeds_weights: bool = False

    @classmethod
    def of(cls, nodes: Sequence[ir.Node], outputs: Sequence[ir.Value], embeds_weights: bool = False) -> _Side:
        ordered = sort_nodes(nodes)
        return cls(ordered, outer_values(ordered, outputs), list(outputs), embeds_weights)

    @property
    def fed(self) -> list[ir.Value]:
        return [v for v in self.inputs if not self._is_embedded(v)]

    def _is_embedded(self, value: ir.Value) -> bool:
        tensor = value.const_value
        return tensor is not None and (self.embeds_weights or tensor.size <= _EMBEDDED_ELEMENTS)

    def model_bytes(self, feeds: dict[ir.Value, np.ndarray], imports: dict[str, int]) -> bytes:
        """Serialize; small constants inside, everything else as inputs v0, v1, … of any shape."""
        stand_ins: dict[ir.Value, ir.Value] = {}
        names = {value: f"v{index}" for index, value in enumerate(self.fed)}
        for index, value in enumerate(self.inputs):
            array = feeds[value]
            if value in names:
                kind = ir.TensorType(ir.DataType.from_numpy(array.dtype))
                stand_ins[value] = ir.Value(name=names[value], type=kind, shape=ir.Shape([None] * array.ndim))
            else:
                stand_ins[value] = ir.Value(name=f"c{index}", const_value=ir.tensor(array))
        return model_of(self.nodes, self.outputs, stand_ins, imports, widens=True)


def _widened(tensor: ir.TensorProtocol) -> np.ndarray:
    """Return a constant, float16 and bfloat16 as float32; a large one is widened piece by piece."""
    if tensor.dtype not in HALF:
        return np.asarray(tensor.numpy())
    if tensor.size <= _PIECE_ELEMENTS:
        return np.asarray(tensor.numpy().astype(np.float32))
    shape = tuple(int(d) for d in tensor.shape.numpy())
    multiple = getattr(tensor, "row_multiple", 1)
    step = max(1, _PIECE_ELEMENTS // max(1, tensor.size // shape[0] * multiple)) * multiple
    wide = np.empty(shape, np.float32)
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        wide[start:stop] = rows_of(tensor, start, stop)
    return wide


def _feed(spec: Spec, magnitude: float, rng: np.random.Generator) -> np.ndarray:
    if spec.value is not None:
        return np.asarray(spec.value.astype(np.float32) if spec.dtype in HALF else spec.value)
    dtype = np.dtype(np.float32) if spec.dtype in HALF else spec.dtype.numpy()
    if dtype.kind == "f":
        return (rng.standard_normal(spec.shape) * magnitude).astype(dtype)
    return rng.integers(0, 2, spec.shape).astype(dtype)


def _compare(
    cases: Sequence[Case],
    before: Sequence[Sequence[np.ndarray]],
    after: Sequence[Sequence[np.ndarray]],
    limit: float,
    step: float,
    *,
    rows_that_matter: bool,
) -> Proof:
    worst = 0.0
    for case, old_arrays, new_arrays in zip(cases, before, after, strict=True):
        rows = case.query_is_token() if rows_that_matter else None
        for old_array, new_array in zip(old_arrays, new_arrays, strict=True):
            error, reason = _difference(old_array, new_array, rows, step * case.magnitude)
            worst = max(worst, error)
            if reason or error > limit:
                return Proof(worst, f"{case.name}: " + (reason or f"relative error {error:.2g} > {limit:.2g}"))
    return Proof(worst)


def _difference(before: np.ndarray, after: np.ndarray, rows: np.ndarray | None, step: float) -> tuple[float, str]:
    if before.shape != after.shape:
        return 0.0, f"shapes differ, {before.shape} before and {after.shape} after"
    if rows is not None and before.ndim == 3 and before.shape[:2] == rows.shape:
        before, after = before[rows], after[rows]
    if before.size == 0:
        return 0.0, ""
    if before.dtype.kind != "f":
        return 0.0, "" if np.array_equal(before, after) else "values differ"
    if not np.array_equal(np.isfinite(before), np.isfinite(after)):
        return 0.0, "not the same values are finite"
    finite = np.isfinite(before)
    scale = max(float(np.abs(before[finite]).max(initial=0.0)) or step, _SMALLEST)
    return float(np.abs(before[finite] - after[finite]).max(initial=0.0)) / scale, ""
