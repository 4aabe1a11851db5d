"""The board: total = 0.4 accuracy + 0.4 performance + 0.2 format, as a record, a table and a page."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from qcompile.package.matrix import Cell
from qcompile.package.steps import BASELINE, UNFUSED, Step
from qcompile.report.chart_file import ChartFile, Table
from qcompile.report.numbers import printable
from qcompile.report.plots import Bar, Line, bar_plot, line_plot

WEIGHTS = {"accuracy": 0.4, "performance": 0.4, "format": 0.2}
SUBMITTED = "the package"


@dataclass
class Board:
    """Everything `qcompile judge` says.

    Attributes:
        name: Of the package.
        score: Of `score_of`; None when only the matrix was asked for.
        steps: Of the optimization.
        cells: Of the matrix.
        baseline: Name and tokens per second of the organiser's baseline; None when there is none.
        best: The same of the best team.
        notes: What a reader must know.
        findings: What was wrong with the form.
        cases: Verdicts.
    """

    name: str
    score: dict[str, Any] | None = None
    steps: list[Step] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    baseline: tuple[str, float] | None = None
    best: tuple[str, float] | None = None
    notes: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    cases: list[dict[str, Any]] = field(default_factory=list)

    def name_ends(self, baseline: float | None, best: float | None) -> None:
        """Fix the two ends of the performance score: as given, else measured in this run."""
        measured = {step.name: step.tokens_per_s for step in self.steps if step.tokens_per_s is not None}
        if baseline is not None:
            self.baseline = ("given", baseline)
        else:
            name = next((name for name in (BASELINE, UNFUSED) if name in measured), None)
            self.baseline = (name, measured[name]) if name is not None else None
        if self.score is not None and self.score["speed"]["tokens_per_s"] is not None:
            measured[SUBMITTED] = self.score["speed"]["tokens_per_s"]
        if best is not None:
            self.best = ("given", best)
        elif measured:
            name = max(measured, key=lambda one: measured[one])
            self.best = (f"{name}, the best of this run", measured[name])

        self.notes += [
            f"performance: {points} points are {end[1]:.1f} tokens/s ({end[0]})"
            for points, end in ((0, self.baseline), (100, self.best))
            if end is not None and self.score is not None
        ]

    @property
    def points(self) -> dict[str, float | None]:
        """Accuracy, performance, format and total, each of 100; None where it cannot be told."""
        if self.score is None:
            return dict.fromkeys([*WEIGHTS, "total"])
        everything = self.score["all"]
        points = {
            "accuracy": _percent(everything["accuracy"]["share"]),
            "performance": self._performance(self.score["speed"]["tokens_per_s"]),
            "format": _percent(everything["format"]["share"]),
        }
        known = [points[name] for name in WEIGHTS]
        total = None if None in known else sum(WEIGHTS[name] * (points[name] or 0.0) for name in WEIGHTS)
        return {**points, "total": None if total is None else round(total, 2)}

    def _performance(self, speed: float | None) -> float | None:
        """Min-max between baseline and best; below the baseline 0."""
        if speed is None or self.baseline is None or self.best is None:
            return None
        low, high = self.baseline[1], self.best[1]
        if speed < low:
            return 0.0
        if high <= low:
            return 100.0
        return round(min(100.0, 100 * (speed - low) / (high - low)), 2)

    def record(self) -> dict[str, Any]:
        """The whole as JSON."""
        return {
            "package": self.name,
            "points": self.points,
            "weights": WEIGHTS,
            "baseline": self.baseline,
            "best": self.best,
            "score": self.score,
            "steps": [step.record() for step in self.steps],
            "matrix": [cell.record() for cell in self.cells],
            "findings": self.findings,
            "notes": self.notes,
            "cases": self.cases,
        }


def render(board: Board) -> RenderableType:
    """Return the terminal tables."""
    parts: list[RenderableType] = []
    for table in _tables(board):
        shown = RichTable(box=None, header_style="dim", pad_edge=False, title=table.title, title_justify="left")
        for i, column in enumerate(table.columns):
            shown.add_column(column, justify="right" if i else "left")
        for row in table.rows:
            shown.add_row(*(Text(printable(cell)) for cell in row))
        parts += [shown, Text("")]
    parts += [Text(f"found: {line}", style="red") for line in board.findings]
    parts += [Text(f"note: {line}") for line in board.notes]
    return Group(*parts)


def write_page(board: Board, path: Path) -> None:
    """Write the page, or the picture when `path` ends in .svg.

    Raises:
        ArtifactError: It cannot be written.
    """
    points = board.points
    cards = [(name, _shown(points[name])) for name in ("total", *WEIGHTS)] if board.score else []
    if board.score:
        cards.append(("tokens/s", _figure(board.score["speed"]["tokens_per_s"])))
    notes = [*(f"found: {line}" for line in board.findings), *board.notes]
    ChartFile("qcompile judge", board.name, cards, _plots(board), _tables(board), notes).write(path)


def _plots(board: Board) -> list[str]:
    plots = []
    bars = [_bar(step, board.steps) for step in board.steps if step.tokens_per_s is not None]
    if bars:
        plots.append(bar_plot("tokens/s, step by step", bars, unit="tokens/s"))
    shapes = dict.fromkeys((cell.input_tokens, cell.output_tokens) for cell in board.cells)
    concurrencies = list(dict.fromkeys(cell.concurrency for cell in board.cells))
    if shapes:
        speeds = {(c.concurrency, c.input_tokens, c.output_tokens): c.tokens_per_s for c in board.cells}
        lines = [Line(f"{i} in, {o} out", [speeds.get((c, i, o)) for c in concurrencies]) for i, o in shapes]
        labels = [str(concurrency) for concurrency in concurrencies]
        plots.append(line_plot("tokens/s by concurrency", "requests together", labels, lines, log=False))
    return plots


def _bar(step: Step, steps: Sequence[Step]) -> Bar:
    assert step.tokens_per_s is not None
    return Bar(step.name, step.tokens_per_s, f"{step.tokens_per_s:.1f}{_gain(step, steps)}")


def _gain(step: Step, steps: Sequence[Step]) -> str:
    """By how much a step is faster than the one before it."""
    place = steps.index(step)
    before = next((s.tokens_per_s for s in reversed(steps[:place]) if s.tokens_per_s), None)
    return f" (x{step.tokens_per_s / before:.2f})" if before and step.tokens_per_s else ""


def _tables(board: Board) -> list[Table]:
    tables = []
    if board.score is not None:
        points = board.points
        rows = [[name, f"{weight:.1f}", _shown(points[name])] for name, weight in WEIGHTS.items()]
        total = ["total", "", _shown(points["total"])]
        tables.append(Table("Points", ("", "weight", "points"), [*rows, total]))
        tables.append(
            Table("Answers", ("", "cases", "answered", "format", "accuracy", "first text"), _score_rows(board.score))
        )
        speed = board.score["speed"]
        spread = speed["duration_ms"] or {}
        row = [f"{speed['tokens']:,}", _figure(speed["seconds"]), _figure(speed["tokens_per_s"])]
        row += [f"{spread[name]:.0f}" if spread else "" for name in ("median", "p95", "max")]
        columns = ("tokens", "seconds", "tokens/s", "ms a case, median", "p95", "max")
        tables.append(Table("Speed", columns, [row]))
    if board.steps:
        tables.append(
            Table(
                "Step by step, the same questions in one run",
                ("", "batch", "tokens/s", "gain", "load s", "same texts"),
                [_step_row(s, board.steps) for s in board.steps],
            )
        )
    if board.cells:
        columns = ("together", "in", "out", "tokens/s", "ms", "first token ms")
        tables.append(Table("Matrix", columns, [_cell_row(cell) for cell in board.cells]))
    return tables


def _score_rows(score: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, one in {**score["by_type"], "all": score["all"]}.items():
        shares = [f"{one[k]['count']:g} of {one[k]['total']}" for k in ("format", "accuracy", "accuracy_first_text")]
        rows.append([name, str(one["cases"]), str(one["answered"]), *shares])
    return rows


def _step_row(step: Step, steps: Sequence[Step]) -> list[str]:
    if step.tokens_per_s is None:
        return [step.name, str(step.batch_size), "not run", step.reason[:60], "", ""]
    gain = _gain(step, steps).strip(" ()")
    return [
        step.name,
        str(step.batch_size),
        f"{step.tokens_per_s:.1f}",
        gain,
        f"{step.load_s:.2f}",
        f"{step.same_texts} of {step.count}",
    ]


def _cell_row(cell: Cell) -> list[str]:
    where = [str(cell.concurrency), str(cell.input_tokens), str(cell.output_tokens)]
    if cell.tokens_per_s is None:
        return [*where, "not run", cell.reason[:60], ""]
    return [*where, f"{cell.tokens_per_s:.1f}", f"{cell.duration_ms:.0f}", f"{cell.ttft_ms:.0f}"]


def _percent(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 2)


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1f}"


def _shown(points: float | None) -> str:
    return "not scored" if points is None else f"{points:.1f}"
