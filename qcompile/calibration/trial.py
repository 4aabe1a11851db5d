"""Run a model with some of its tensors quantized and the rest float, and compare the distributions it gives.

The float model runs once, and what every block reads is kept. A trial then starts at the first block that it changes,
so that a tensor of the last layer costs one block and not all. The head is computed here, for some positions only: it is
as large as a third of a small model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.calibration.blocks import Block
from qcompile.calibration.runner import Array, BlockRunner, Row, Say, feeds_of
from qcompile.errors import QuantError
from qcompile.passes.quantize_projections import HEAD, Projection, find_projections
from qcompile.passes.unit_norm import scheme_for_input
from qcompile.quant.activations import INT8_MAX, UNIT_NORM_STEP, round_per_tensor, round_per_token
from qcompile.quant.algorithms import NEEDS_HESSIAN, weight_quantizer
from qcompile.quant.scheme import FloatArray, InputStatistics, WeightScheme, check_weight
from qcompile.quantize_options import LinearScheme

NUM_POSITIONS = 256
_HEAD_ROWS = 16384
_LOGIT_POSITIONS = 64
_SMALLEST = 1e-30


@dataclass(frozen=True)
class Tensor:
    """One weight to quantize, with everything that reads it (a tied embedding and head are one).

    Attributes:
        name: What it is called.
        uses: The projections that read it, in graph order.
    """

    name: str
    uses: tuple[Projection, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return self.uses[0].num_outputs, self.uses[0].num_inputs

    @property
    def reader(self) -> Projection:
        """The use that says most of it: a projection before a lookup."""
        return next((use for use in self.uses if not use.is_lookup), self.uses[0])

    def size_bytes(self, scheme: LinearScheme | None) -> int:
        """Return the bytes it takes in a scheme, or as it is."""
        if scheme is None:
            return self.shape[0] * self.shape[1] * int(self.reader.dtype.itemsize)
        return weight_scheme(scheme).size_bytes(*self.shape)


@dataclass(frozen=True)
class Divergence:
    """KL(float || trial) over the positions compared, in nats.

    Attributes:
        mean: Per token.
        p99: 99th percentile.
        same_top: Share of positions with the same most likely token.
    """

    mean: float
    p99: float
    same_top: float


def tensors_of(graph: ir.Graph) -> list[Tensor]:
    """Return every weight that can be quantized, one entry for each even if several operators read it."""
    by_source: dict[ir.Value, list[Projection]] = {}
    for projection in find_projections(graph):
        by_source.setdefault(projection.source, []).append(projection)
    found = []
    for uses in by_source.values():
        reader = next((use for use in uses if not use.is_lookup), uses[0])
        found.append(Tensor(reader.name, tuple(uses)))
    return found


def rounds(node: ir.Node, scheme: LinearScheme) -> bool:
    """Whether a scheme rounds the inputs of a node: a lookup has none."""
    return scheme.activations != "float" and node.op_type != "Gather"


def rounded_inputs(x: FloatArray, scheme: LinearScheme, step: float | None) -> FloatArray:
    """Return inputs [T, K] as a scheme rounds them."""
    if scheme.activations == "float":
        return x
    return round_per_token(x) if scheme.activations == "dynamic" or step is None else round_per_tensor(x, step)


def weight_scheme(scheme: LinearScheme) -> WeightScheme:
    """Return how a scheme stores a weight."""
    group_size = None if scheme.group_size == "channel" else scheme.group_size
    return WeightScheme(scheme.bits, group_size, scheme.symmetric, "float16")


class Trials:
    """A float model, run once, against which changed ones are compared.

    Args:
        model: A float decoder graph; not to be changed while trials are made of it.
        rows: A few short rows: a trial costs up to one pass over them.
        num_positions: Positions whose distributions are compared, evenly spaced.
        rounds_per_token: Whether the target has kernels for activations with a scale per token.
        say: Called with (what, done, total).

    Raises:
        QuantError: The graph has no head that can be found, or it cannot be run.
    """

    def __init__(
        self,
        model: ir.Model,
        rows: Sequence[Row],
        *,
        num_positions: int = NUM_POSITIONS,
        rounds_per_token: bool = True,
        say: Say | None = None,
    ) -> None:
        self.tensors = tensors_of(model.graph)
        uses = [use for tensor in self.tensors for use in tensor.uses]
        head = next((use for use in uses if HEAD in use.names), None)
        hidden = head.node.inputs[0] if head is not None else None
        if head is None or hidden is None:
            raise QuantError("sensitivity: no projection gives the logits; it needs a decoder with a head")
        self.head, self.hidden = head, hidden
        inputs = [use.node.inputs[0] for use in uses if not use.is_lookup]
        self.runner = BlockRunner(model, list(dict.fromkeys([*(v for v in inputs if v is not None), hidden])))
        self.rows, self.rounds_per_token = rows, rounds_per_token
        self.inputs: dict[ir.Value, FloatArray] = {}
        self._states: list[list[dict[ir.Value, Array]]] = []
        total = sum(map(len, rows))
        self._positions = np.unique(np.linspace(0, total - 1, min(num_positions, total)).astype(int))
        self._block_of = self._blocks_of_uses(uses)
        self._run_float(say or (lambda what, done, total: None))
        self._reference = self._log_probabilities(self.inputs[hidden][self._positions], None, None)
        self._probabilities = np.exp(self._reference)

    @property
    def num_positions(self) -> int:
        """Positions whose distributions are compared."""
        return len(self._positions)

    def statistics(self, tensor: Tensor) -> InputStatistics:
        """Return what these rows say of a tensor's inputs; empty for a table that is only looked up."""
        x = self.inputs.get(tensor.reader.node.inputs[0]) if not tensor.reader.is_lookup else None  # type: ignore[arg-type]
        if x is None:
            zeros = np.zeros(tensor.shape[1], np.float32)
            return InputStatistics(0, zeros, zeros)
        return InputStatistics(len(x), np.abs(x).max(axis=0), np.abs(x).mean(axis=0), x.T @ x, x)

    def step_of(self, tensor: Tensor, scheme: LinearScheme) -> float | None:
        """Return the one step that inputs are rounded by; None for a step per token.

        Static inputs: the largest value of these rows becomes code 127. ``norm``: the known step behind a unit norm,
        elsewhere what the pass makes of it.
        """
        value = tensor.reader.node.inputs[0]
        assert value is not None
        return self._rounding_step(value, self.inputs[value], scheme)

    def _rounding_step(self, value: ir.Value, x: FloatArray, scheme: LinearScheme) -> float | None:
        done = scheme_for_input(scheme, value, rounds_per_token=self.rounds_per_token)
        if done.activations == "norm":
            return UNIT_NORM_STEP
        return max(float(np.abs(x).max()), _SMALLEST) / float(INT8_MAX) if done.activations == "static" else None

    def original(self, tensor: Tensor) -> FloatArray:
        """Return a tensor as it is, [N, K]."""
        return check_weight(tensor.uses[0].rows(0, tensor.shape[0]), tensor.name)

    def quantized(
        self,
        tensor: Tensor,
        scheme: LinearScheme,
        statistics: InputStatistics | None,
        original: FloatArray | None = None,
    ) -> FloatArray:
        """Return [N, K]: what a tensor's codes stand for; `original` saves reading it again."""
        weight = self.original(tensor) if original is None else original
        algorithm = scheme.algorithm
        if algorithm in NEEDS_HESSIAN:
            statistics = statistics or self.statistics(tensor)
            algorithm = "mse" if statistics.hessian is None else algorithm
        return weight_quantizer(weight_scheme(scheme), algorithm, statistics, name=tensor.name)(weight).dequantize()

    def compare(
        self,
        changes: Mapping[str, LinearScheme],
        statistics: Mapping[str, InputStatistics] | None = None,
        restored: Mapping[str, FloatArray] | None = None,
    ) -> Divergence:
        """Run the model with some tensors quantized.

        Args:
            changes: Tensor name to scheme; every other tensor stays float.
            statistics: About the inputs of the tensors; those of these few rows where there is none.
            restored: What `quantized` returned for some of them, which then is not computed again.
        """
        done = _Restored(self, statistics or {}, restored or {})
        changed = [(t, changes[t.name]) for t in self.tensors if t.name in changes]
        uses = {use.node: (t, scheme) for t, scheme in changed for use in t.uses}
        first = min((self._block_of[n] for n in uses if n in self._block_of), default=len(self.runner.blocks))
        hidden = self._hidden_from(first, uses, done)
        head = uses.get(self.head.node)
        table = None if head is None else done(*head)
        trial = self._log_probabilities(hidden[self._positions], table, head[1] if head else None)
        return _divergence(self._reference, self._probabilities, trial)

    def _blocks_of_uses(self, uses: Sequence[Projection]) -> dict[ir.Node, int]:
        nodes = {use.node for use in uses}
        return {node: i for i, block in enumerate(self.runner.blocks) for node in block.nodes if node in nodes}

    def _run_float(self, say: Say) -> None:
        states = [dict(feeds_of(self.runner.graph, tokens)) for tokens in self.rows]
        taken: dict[ir.Value, list[Array]] = {}
        for index, block in enumerate(self.runner.blocks):
            self._states.append(states)
            session = self.runner.session(index, states[0])
            weights = session.weights()
            states = [self._step(block, session.run(state, weights), state, taken) for state in states]
            _check_finite(taken, block)
            say("running the float model", index + 1, len(self.runner.blocks))
        self.inputs = {v: np.concatenate([a.reshape(-1, a.shape[-1]) for a in parts]) for v, parts in taken.items()}

    def _step(
        self,
        block: Block,
        written: dict[ir.Value, Array],
        state: dict[ir.Value, Array],
        taken: dict[ir.Value, list[Array]],
    ) -> dict[ir.Value, Array]:
        for value, array in written.items():
            if value in self.runner.wanted:
                taken.setdefault(value, []).append(array)
        return {v: a for v, a in {**state, **written}.items() if v in block.kept}

    def _hidden_from(
        self,
        first: int,
        uses: Mapping[ir.Node, tuple[Tensor, LinearScheme]],
        done: _Restored,
    ) -> FloatArray:
        """Return the head's inputs [T, D], with the blocks from `first` on run again."""
        if first >= len(self.runner.blocks):
            return self.inputs[self.hidden]
        states = self._states[first]
        taken: dict[ir.Value, list[Array]] = {}
        for index in range(first, len(self.runner.blocks)):
            block = self.runner.blocks[index]
            own = {node: uses[node] for node in block.nodes if node in uses}
            rounded = {n: self.step_of(tensor, scheme) for n, (tensor, scheme) in own.items() if rounds(n, scheme)}
            session = self.runner.session(index, states[0], rounded)
            weights = session.weights()
            for node, (tensor, scheme) in own.items():
                restored = done(tensor, scheme)
                use = next(u for u in tensor.uses if u.node is node)
                direct = node.inputs[1] is use.source and not use.is_lookup
                weights[use.source] = np.ascontiguousarray(restored.T) if direct else restored
            states = [self._step(block, session.run(state, weights), state, taken) for state in states]
        parts = taken[self.hidden]
        return np.concatenate([a.reshape(-1, a.shape[-1]) for a in parts])

    def _log_probabilities(
        self, hidden: FloatArray, table: FloatArray | None, scheme: LinearScheme | None
    ) -> FloatArray:
        """Return the log probabilities [positions, V] of the head's inputs."""
        x = hidden
        if scheme is not None:
            x = rounded_inputs(hidden, scheme, self._rounding_step(self.hidden, hidden, scheme))
        logits = np.empty((len(x), self.head.num_outputs), np.float32)
        for start, stop in _ranges(self.head.num_outputs, _HEAD_ROWS):
            rows = self.head.rows(start, stop) if table is None else table[start:stop]
            logits[:, start:stop] = x @ np.asarray(rows, np.float32).T
        for start, stop in _ranges(len(logits), _LOGIT_POSITIONS):
            part = logits[start:stop]
            part -= part.max(axis=1, keepdims=True)
            part -= np.log(np.exp(part).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
        return logits


def _check_finite(taken: Mapping[ir.Value, Sequence[Array]], block: Block) -> None:
    """Refuse a model whose own values are not finite, at the first that a projection reads."""
    for node in block.nodes:
        for value in node.outputs:
            if not all(np.isfinite(array).all() for array in taken.get(value, ())):
                raise QuantError(
                    f"sensitivity: '{value.name}' has NaN or infinite values: the model overflows on the calibration text; "
                    "look for huge weights in the layers before it"
                )


@dataclass(frozen=True)
class _Restored:
    """What quantized tensors stand for: what is known already, the rest computed when it is asked for."""

    trials: Trials
    statistics: Mapping[str, InputStatistics]
    known: Mapping[str, FloatArray]

    def __call__(self, tensor: Tensor, scheme: LinearScheme) -> FloatArray:
        if tensor.name in self.known:
            return self.known[tensor.name]
        return self.trials.quantized(tensor, scheme, self.statistics.get(tensor.name))


def _divergence(reference: FloatArray, probabilities: FloatArray, trial: FloatArray) -> Divergence:
    """Compare log probabilities [T, V]; terms in float32, as they are, and their sums in float64."""
    parts, same = [], 0
    for start, stop in _ranges(len(reference), _LOGIT_POSITIONS):
        p, q = reference[start:stop], trial[start:stop]
        parts.append((probabilities[start:stop] * (p - q)).sum(axis=1, dtype=np.float64))
        same += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
    kl = np.maximum(np.concatenate(parts), 0.0)
    if not np.isfinite(kl).all():
        raise QuantError(
            "sensitivity: logits are NaN or infinite on the calibration text; look for huge weights in the head"
        )
    return Divergence(float(kl.mean()), float(np.quantile(kl, 0.99)), same / len(kl))


def _ranges(total: int, step: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + step, total)) for start in range(0, total, step))
