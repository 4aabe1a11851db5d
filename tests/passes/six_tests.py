"""The six tests that every pass has; a test file fills in examples, near misses and counts.

1. text in, text out: what the pass makes of each example, in every float type, with inputs and outputs kept;
2. near misses: what it leaves alone to the byte, and the reason it gives;
3. numbers: before and after agree on ONNX Runtime, over batches and lengths, limit by dtype;
4. a second run changes nothing;
5. the same bytes under two values of PYTHONHASHSEED;
6. the exact count on the tiny Qwens of three exporters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.passes.base import Pass, PassContext, PassResult
from qcompile.passes.proof import Prover
from qcompile.passes.registry import CANONICALIZE, CLEAN
from tests.passes.graph_text import (
    FLOATS,
    LIMITS,
    draw_feeds,
    expressions,
    model_bytes,
    read_graph,
    relative_error,
    run_graph,
)

TIDY = (*CLEAN, *CANONICALIZE, *CLEAN, *CANONICALIZE, *CLEAN)
# (batch, length, past) of the runs that are compared.
CALLS = ((1, 1, 5), (1, 4, 0), (3, 2, 6))
EXACT = {"float": 0.0, "float16": 0.0}
Weights = Mapping[str, Sequence[int] | np.ndarray]


@dataclass(frozen=True)
class Example:
    """A graph and what the pass makes of it.

    Attributes:
        name: For the test's id.
        before: The graph, see `read_graph`.
        after: Output name to expression; None where only numbers and counts matter.
        weights: Initializers.
        rewrites: How many rewrites the pass reports.
        opset: Of the graph.
        dtypes: The float types to try; by default all for a pass's first example, float and one more for the others.
    """

    name: str
    before: str
    after: Mapping[str, str] | None
    weights: Weights = field(default_factory=dict)
    rewrites: int = 1
    opset: int = 18
    dtypes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class NearMiss:
    """A graph that a pass leaves alone.

    Attributes:
        name: For the test's id.
        before: The graph.
        reason: Part of what is said, in the result or by `explain`; None where a spelling differs and nobody is told.
        weights: Initializers.
        opset: Of the graph.
        dtype: Float type.
    """

    name: str
    before: str
    reason: str | None
    weights: Weights = field(default_factory=dict)
    opset: int = 18
    dtype: str = "float"


@dataclass(frozen=True)
class Outcome:
    """What a pass did to an example, and the inputs and outputs the graph had before."""

    context: PassContext
    result: PassResult
    interface: list[tuple[str | None, Any, str]]


class SixTests:
    """Subclass as `TestSomething`; pytest collects the six tests with these tables."""

    pass_class: ClassVar[type[Pass]]
    prepare: ClassVar[tuple[type[Pass], ...]] = ()
    examples: ClassVar[tuple[Example, ...]]
    near_misses: ClassVar[tuple[NearMiss, ...]]
    counts: ClassVar[tuple[tuple[str, int], ...]]
    limits: ClassVar[Mapping[str, float]] = LIMITS
    keeps_interface: ClassVar[bool] = True

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """One test per example and dtype, per near miss, per tiny Qwen."""
        if "dtype" in metafunc.fixturenames:
            # ONNX Runtime has no bfloat16 on CPU; there the proof inside the pass is what checks the numbers.
            runs = self.limits if metafunc.function.__name__ == "test_numbers_agree" else FLOATS
            pairs = [(e, d) for i, e in enumerate(self.examples) for d in _dtypes(e, i) if d in runs]
            metafunc.parametrize(("example", "dtype"), pairs, ids=[f"{e.name}-{d}" for e, d in pairs])
        if "miss" in metafunc.fixturenames:
            metafunc.parametrize("miss", self.near_misses, ids=[m.name for m in self.near_misses])
        if "graph_name" in metafunc.fixturenames:
            metafunc.parametrize(("graph_name", "count"), self.counts, ids=[name for name, _ in self.counts])

    @classmethod
    def prepared(cls, text: str, weights: Weights, dtype: str, opset: int) -> PassContext:
        """Read a graph and bring it where the pass finds it in the pipeline."""
        context = PassContext(read_graph(text, weights, dtype, opset), Prover())
        for pass_class in cls.prepare:
            pass_class()(context)
        return context

    @classmethod
    def run(cls, context: PassContext) -> PassResult:
        """Run the pass once."""
        return cls.pass_class()(context)

    @classmethod
    def outcome(cls, example: Example, dtype: str) -> Outcome:
        """Run the pass on an example; the tests of one example share the outcome."""
        return _outcome(cls, example.name, dtype)

    def test_text_in_text_out(self, example: Example, dtype: str) -> None:
        outcome = self.outcome(example, dtype)
        model, result = outcome.context.model, outcome.result
        assert result.rejected == []
        assert result.rewrites == example.rewrites
        if example.after is not None:
            assert expressions(model) == example.after
        assert (_interface(model) == outcome.interface) == self.keeps_interface
        names = [n.name for n in model.graph if n.name]
        assert len(set(names)) == len(names)

    def test_near_miss_is_left_alone_with_its_reason(self, miss: NearMiss) -> None:
        context = self.prepared(miss.before, miss.weights, miss.dtype, miss.opset)
        before = model_bytes(context.model)
        # The conditions of a rule are enough: with proofs switched off nothing happens either.
        context.prover = None
        assert self.run(context).rewrites == 0
        assert model_bytes(context.model) == before
        context.prover = Prover()
        result = self.run(context)
        assert result.rewrites == 0
        assert model_bytes(context.model) == before
        reasons = [r.reason for r in (*result.rejected, *self.pass_class().explain(context))]
        if miss.reason is None:
            assert [r.reason for r in result.rejected] == []
        else:
            assert any(miss.reason in reason for reason in reasons), reasons

    def test_numbers_agree(self, example: Example, dtype: str) -> None:
        original = read_graph(example.before, example.weights, dtype, example.opset)
        model = self.outcome(example, dtype).context.model
        for index, (batch, length, past) in enumerate(CALLS):
            feeds = draw_feeds(original, batch, length, past, seed=index)
            for a, b in zip(run_graph(original, feeds), run_graph(model, feeds), strict=True):
                assert relative_error(a, b) <= self.limits[dtype]

    def test_second_run_changes_nothing(self, example: Example, dtype: str) -> None:
        context = self.outcome(example, dtype).context
        before = model_bytes(context.model)
        assert self.run(context).rewrites == 0
        assert model_bytes(context.model) == before

    def test_same_bytes_whatever_the_hash_seed(self, digests: list[dict[str, str]]) -> None:
        mine = [{k: v for k, v in seen.items() if k.startswith(f"{self.pass_class.name} ")} for seen in digests]
        assert mine[0]
        assert mine[0] == mine[1]

    def test_exact_count_on_tiny_qwen(
        self, graph_name: str, count: int, counts_of: Callable[[str], dict[str, int]]
    ) -> None:
        assert counts_of(graph_name)[self.pass_class.name] == count


def all_six_tests() -> list[type[SixTests]]:
    """Return every filled-in subclass that has been imported."""
    found: list[type[SixTests]] = []
    todo = [SixTests]
    while todo:
        for subclass in todo.pop().__subclasses__():
            todo.append(subclass)
            found.append(subclass)
    return sorted((c for c in found if hasattr(c, "pass_class")), key=lambda c: (c.__module__, c.__name__))


def _dtypes(example: Example, index: int) -> tuple[str, ...]:
    if example.dtypes is not None:
        return example.dtypes
    return tuple(FLOATS) if index == 0 else ("float", ("float16", "bfloat16")[index % 2])


@functools.cache
def _outcome(tests_of_pass: type[SixTests], name: str, dtype: str) -> Outcome:
    example = next(e for e in tests_of_pass.examples if e.name == name)
    context = tests_of_pass.prepared(example.before, example.weights, dtype, example.opset)
    interface = _interface(context.model)
    return Outcome(context, tests_of_pass.run(context), interface)


def _interface(model: ir.Model) -> list[tuple[str | None, Any, str]]:
    return [(v.name, v.dtype, str(v.shape)) for v in (*model.graph.inputs, *model.graph.outputs)]
