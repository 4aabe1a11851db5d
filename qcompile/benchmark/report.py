"""From the samples of several rounds to medians, spread and the share of what the machine allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from qcompile.benchmark.cases import Case
from qcompile.benchmark.traffic import Floor, Traffic

_NOISY = 0.15

Samples = Mapping[Case, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and number of some measurements."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Take at least one number."""
        low, median, high = (float(q) for q in np.percentile(values, (25, 50, 75)))
        return cls(median, low, high, len(values))

    @property
    def noise(self) -> float:
        """Interquartile range over the median."""
        return (self.high - self.low) / self.median if self.median else 0.0


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        metric: What: ``prefill``, ``decode``, ``ttft``, ``load`` or ``peak rss``.
        batch: Requests together.
        context: Prompt tokens of each.
        unit: ``tokens/s``, ``s`` or ``bytes``.
        value: The measurements; None when the case did not run.
        floor: The best the machine allows, in the same unit; None where there is no such thing.
        reason: Why it did not run.
    """

    metric: str
    batch: int
    context: int
    unit: str
    value: Spread | None
    floor: float | None = None
    reason: str = ""

    @property
    def fraction(self) -> float | None:
        """Share of the floor's speed that is reached."""
        if self.value is None or not self.floor or not self.value.median:
            return None
        return self.value.median / self.floor if self.unit == "tokens/s" else self.floor / self.value.median

    def record(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {**asdict(self), "fraction": self.fraction}


@dataclass
class BenchReport:
    """Everything `qcompile bench` says."""

    directory: str
    machine: dict[str, Any]
    model: dict[str, Any]
    floor: dict[str, Spread]
    rows: list[Row]
    samples: list[dict[str, Any]]
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {
            "directory": self.directory,
            "machine": self.machine,
            "model": self.model,
            "floor": {name: asdict(spread) for name, spread in self.floor.items()},
            "rows": [row.record() for row in self.rows],
            "samples": self.samples,
            "warnings": self.warnings,
            "seconds": round(self.seconds, 2),
        }

    def row(self, metric: str, batch: int, context: int) -> Row | None:
        """Return one figure, or None when it was not asked for."""
        return next((r for r in self.rows if (r.metric, r.batch, r.context) == (metric, batch, context)), None)


def rows_of(samples: Samples, traffic: Traffic, floor: Floor) -> list[Row]:
    """Reduce the samples of every case to rows."""
    rows = [_prefill(case, taken, traffic, floor) for case, taken in samples.items() if case.batch == 1]
    rows += [_decode(case, taken, traffic, floor) for case, taken in samples.items()]
    rows += [
        _row("ttft", case, "s", taken, lambda s: s["ttft_s"], floor=traffic.prefill_seconds(case.context, floor))
        for case, taken in samples.items()
        if case.batch == 1
    ]
    rows += [_row("peak rss", case, "bytes", taken, lambda s: s["peak_rss_bytes"]) for case, taken in samples.items()]
    return rows


def load_row(samples: Samples) -> Row:
    """Return the time to load the model, over all cases."""
    everything = [s for taken in samples.values() for s in taken]
    return _row("load", Case(0, 0, 0), "s", everything, lambda s: s["load_s"])


def noise_warnings(rows: Sequence[Row]) -> list[str]:
    """Name the figures whose middle half spreads over more than 15 % of the median."""
    noisy = [
        f"{r.metric}{f' batch {r.batch} context {r.context}' if r.batch else ''} ({r.value.noise:.0%})"
        for r in rows
        if r.value is not None and r.unit != "bytes" and r.value.noise > _NOISY
    ]
    return [f"noisy: {', '.join(noisy)}; repeat on an idle machine"] if noisy else []


def _prefill(case: Case, taken: Sequence[Mapping[str, Any]], traffic: Traffic, floor: Floor) -> Row:
    best = case.context / traffic.prefill_seconds(case.context, floor)
    return _row("prefill", case, "tokens/s", taken, lambda s: case.context / s["ttft_s"], floor=best)


def _decode(case: Case, taken: Sequence[Mapping[str, Any]], traffic: Traffic, floor: Floor) -> Row:
    contexts = [s["mean_context"] for s in taken if "error" not in s]
    context = float(np.median(contexts)) if contexts else float(case.context)
    best = case.batch / traffic.decode_seconds(case.batch, context, floor)
    return _row("decode", case, "tokens/s", taken, lambda s: s["decode_tokens"] / s["decode_s"], floor=best)


def _row(
    metric: str,
    case: Case,
    unit: str,
    taken: Sequence[Mapping[str, Any]],
    value: Callable[[Mapping[str, Any]], float],
    *,
    floor: float | None = None,
) -> Row:
    good = [value(s) for s in taken if "error" not in s]
    reason = "" if good else next((str(s["error"]) for s in taken if "error" in s), "no measurement")
    return Row(metric, case.batch, case.context, unit, Spread.of(good) if good else None, floor, reason)
