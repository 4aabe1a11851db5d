"""Statistics for a quantization pass: of the model at hand, on the text that was asked for, computed when first needed.

statistics = CalibratedStatistics(TextSource(directory, manifest, "builtin"), with_hessians=True)
statistics.prepare(context.model)                 before the pass replaces its first projection
QuantizeInt4(options, statistics)(context)        calls statistics(projection)
statistics.record()                               for the manifest
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompile.calibration.calibrate import CalibrationSettings, calibrate
from qcompile.calibration.mixed_precision import Decision, Given, Goal, decide
from qcompile.calibration.runner import Say
from qcompile.calibration.sensitivity import Candidates
from qcompile.calibration.store import Calibration
from qcompile.calibration.text_source import TextSource
from qcompile.errors import QuantError
from qcompile.passes.quantize_projections import Projection, find_projections
from qcompile.quant.scheme import InputStatistics

__all__ = ["CalibratedStatistics", "TextSource"]


class CalibratedStatistics:
    """What a quantization pass asks for the statistics of a projection's inputs.

    Args:
        text: Where the text comes from.
        settings: How to calibrate.
        with_hessians: Whether an algorithm needs second moments (`qcompile.quant.algorithms.NEEDS_HESSIAN`, AWQ).
        rounds_per_token: Whether the target has kernels for activations with a scale per token.
        cache: Directory of calibrations; by default under qcompile's cache directory.
        say: Called with (what, done, total).
    """

    def __init__(
        self,
        text: TextSource,
        settings: CalibrationSettings | None = None,
        *,
        with_hessians: bool = True,
        rounds_per_token: bool = True,
        cache: Path | None = None,
        say: Say | None = None,
    ) -> None:
        self.text = text
        self.settings = replace(settings or CalibrationSettings(), with_hessians=with_hessians)
        self.rounds_per_token, self.cache, self.say = rounds_per_token, cache, say
        self.decision: Decision | None = None
        self._calibration: Calibration | None = None

    @property
    def was_used(self) -> bool:
        """Whether a scheme looked at activations."""
        return self._calibration is not None or self.decision is not None

    @property
    def notes(self) -> tuple[str, ...]:
        """What of the text was not as asked."""
        return tuple(note for found in (self.decision, self._calibration) if found is not None for note in found.notes)

    def prepare(self, model: ir.Model) -> Calibration:
        """Calibrate a float model, as it is now.

        Raises:
            QuantError: The text cannot be used or the model cannot be run on it.
        """
        rows = self.text.rows(self.settings, self.say, self.cache)
        inputs = [p.node.inputs[0] for p in find_projections(model.graph) if not p.is_lookup]
        names = [v.name or "" for v in inputs if v is not None and v.producer() is not None]
        self._calibration = calibrate(model, rows, self.settings, names, cache=self.cache, say=self.say)
        return self._calibration

    def __call__(self, projection: Projection) -> InputStatistics:
        """Return the statistics of a projection's inputs; `prepare` comes first.

        Raises:
            QuantError: They were not gathered.
        """
        value = projection.node.inputs[0]
        if self._calibration is None or value is None:
            raise QuantError(f"{projection.name}: the model has not been calibrated")
        return self._calibration.statistics(value.name or "")

    def decide(self, model: ir.Model, candidates: Candidates, goal: Goal, given: Given | None = None) -> Decision:
        """Choose a scheme for every tensor of a float model, and keep the decision for the report.

        Raises:
            QuantError: The goal cannot be reached (the message says the best found), or the model cannot be run.
        """
        self.decision = decide(
            model,
            self.text,
            candidates,
            goal,
            given,
            rounds_per_token=self.rounds_per_token,
            cache=self.cache,
            say=self.say,
        )
        return self.decision

    def record(self) -> dict[str, Any]:
        """Return what the manifest should say of the calibration; empty before `prepare`."""
        return {} if self._calibration is None else self._calibration.record()
