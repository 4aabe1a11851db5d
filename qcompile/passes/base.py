"""What a pass is: a named transformation of a whole model that reports what it did and what it refused."""

from __future__ import annotations

import abc
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import onnx_ir as ir

from qcompile.analysis import Analysis
from qcompile.passes.proof import Prover


@dataclass(frozen=True)
class Rejection:
    """A place where a rule matched (or nearly did) and was not applied, and why."""

    node: str
    rule: str
    reason: str


@dataclass
class PassResult:
    """What one pass did.

    Attributes:
        name: The pass.
        matches: Places whose structure matched a rule.
        rewrites: Places that were changed.
        rejected: Matches that were refused by a condition or failed their proof and were rolled back.
        proved: Rewrites compared numerically before and after; `max_error` is the largest relative difference.
        seconds: Wall time.
        ops_before: Operator histogram before, `domain::op_type` to count.
        ops_after: The same afterwards.
    """

    name: str
    matches: int = 0
    rewrites: int = 0
    rejected: list[Rejection] = field(default_factory=list)
    proved: int = 0
    max_error: float = 0.0
    seconds: float = 0.0
    ops_before: dict[str, int] = field(default_factory=dict)
    ops_after: dict[str, int] = field(default_factory=dict)
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def modified(self) -> bool:
        """Whether the model changed."""
        return self.rewrites > 0

    def record(self) -> dict[str, Any]:
        """Return the result as JSON-ready data, with op counts as totals."""
        data = asdict(self)
        data["ops_before"] = sum(self.ops_before.values())
        data["ops_after"] = sum(self.ops_after.values())
        return data


@dataclass
class PassContext:
    """What a pass works on.

    Attributes:
        model: The model; changed in place.
        prover: Compares each rewrite numerically; None switches proofs off (`--verify off`).
    """

    model: ir.Model
    prover: Prover | None = None
    _analysis: Analysis | None = None

    @property
    def analysis(self) -> Analysis:
        """The concrete cases of the model as it is now."""
        if self._analysis is None:
            self._analysis = Analysis(self.model)
        return self._analysis

    def forget_analysis(self) -> None:
        """Drop the analysis: a pass changed the model without keeping it up to date."""
        self._analysis = None


class Pass(abc.ABC):
    """One transformation of a whole model."""

    name: ClassVar[str]
    summary: ClassVar[str] = ""

    def __call__(self, context: PassContext) -> PassResult:
        """Run the pass, timed, with the operator histogram before and after."""
        result = PassResult(self.name, ops_before=op_histogram(context.model))
        with _timed(result):
            self.call(context, result)
        result.ops_after = op_histogram(context.model)
        return result

    @abc.abstractmethod
    def call(self, context: PassContext, result: PassResult) -> None:
        """Change `context.model` in place and fill in `result`."""

    def explain(self, context: PassContext) -> list[Rejection]:
        """Return the nearest misses: where the pass almost applied, and what was in the way."""
        del context
        return []


@contextmanager
def _timed(result: PassResult) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        result.seconds = time.perf_counter() - start


def op_histogram(model: ir.Model) -> dict[str, int]:
    """Count the nodes of the main graph by `op_type`, with the domain in front when it is not the standard one."""
    names = (n.op_type if n.domain in {"", "ai.onnx"} else f"{n.domain}::{n.op_type}" for n in model.graph)
    return dict(sorted(Counter(names).items()))
