"""A benchmark for people: terminal tables, and the page or picture."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from qcompile.benchmark.report import BenchReport, Row, Spread
from qcompile.report.chart_file import ChartFile, Table
from qcompile.report.numbers import human_bytes, printable
from qcompile.report.plots import Bar, bar_plot

_COLUMNS = ("what", "batch", "context", "median", "middle half", "floor", "reached")


def render(report: BenchReport) -> RenderableType:
    """Return the terminal tables."""
    shown = RichTable(box=None, header_style="dim", pad_edge=False)
    for i, column in enumerate(_COLUMNS):
        shown.add_column(column, justify="right" if i else "left")
    for row in report.rows:
        shown.add_row(*(Text(printable(cell)) for cell in _cells(row)))
    lines = [Text(line) for line in _lines(report)]
    reasons = [Text(f"not run: {line}", style="yellow") for line in _reasons(report)]
    warnings = [Text(f"warning: {line}", style="yellow") for line in report.warnings]
    return Group(*lines, shown, *reasons, *warnings)


def write_chart(report: BenchReport, path: Path) -> None:
    """Write the page, or the picture when `path` ends in .svg.

    Raises:
        ArtifactError: It cannot be written.
    """
    chart_of(report).write(path)


def chart_of(report: BenchReport) -> ChartFile:
    """Return the page's content."""
    first = [r for r in report.rows if r.batch == 1 and r.value is not None]
    cards = [(f"{r.metric} at {r.context}", _show(r.value, r.unit)) for r in first if r.unit == "tokens/s"]
    cards.append(("on disk", human_bytes(report.model["size_bytes"])))
    rows = [_cells(r) for r in report.rows]
    plots = []
    for metric in ("prefill", "decode"):
        chosen = [r for r in report.rows if r.metric == metric and r.value is not None]
        bars = [_bar(r) for r in chosen]
        if bars:
            plots.append(bar_plot(f"{metric}: tokens/s, and what this machine allows (dashed)", bars, unit="tokens/s"))
    notes = [*_lines(report), *(f"not run: {line}" for line in _reasons(report)), *report.warnings]
    return ChartFile("qcompile bench", report.directory, cards, plots, [Table("Measurements", _COLUMNS, rows)], notes)


def _bar(row: Row) -> Bar:
    assert row.value is not None
    share = f" ({row.fraction:.0%} of floor)" if row.fraction is not None else ""
    return Bar(
        f"batch {row.batch}, context {row.context}", row.value.median, f"{row.value.median:.1f}{share}", row.floor
    )


def _cells(row: Row) -> list[str]:
    where = [str(row.batch), str(row.context)] if row.batch else ["", ""]
    if row.value is None:
        return [row.metric, *where, "not run", "", "", ""]
    spread = f"{_number(row.value.low, row.unit)} to {_number(row.value.high, row.unit)}" if row.value.count > 1 else ""
    floor = _number(row.floor, row.unit) if row.floor is not None else ""
    reached = f"{row.fraction:.0%}" if row.fraction is not None else ""
    return [row.metric, *where, _show(row.value, row.unit), spread, floor, reached]


def _show(value: Spread | None, unit: str) -> str:
    if value is None:
        return "not run"
    shown = _number(value.median, unit)
    return shown if unit == "bytes" else f"{shown} {unit}"


def _number(value: float, unit: str) -> str:
    if unit == "bytes":
        return human_bytes(round(value))
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _reasons(report: BenchReport) -> list[str]:
    reasons = {f"batch {r.batch}, context {r.context}: {r.reason}" for r in report.rows if r.value is None}
    return sorted(reasons)


def _lines(report: BenchReport) -> list[str]:
    machine, model, floor = report.machine, report.model, report.floor
    return [
        (
            f"{printable(report.directory)}: {model['target']}, {human_bytes(model['size_bytes'])} of graph and weights, "
            f"{human_bytes(model['directory_bytes'])} in all"
        ),
        (
            f"{printable(machine['cpu'])}, {machine['threads']} threads, onnxruntime {machine['onnxruntime']}, load "
            f"{machine['load_average']}"
        ),
        (
            f"this machine: reads {floor['read_bytes_per_s'].median / 1e9:.1f} GB/s, copies "
            f"{floor['copy_bytes_per_s'].median / 1e9:.1f} GB/s, fp32 {floor['fp32_ops_per_s'].median / 1e9:.0f} and int8 "
            f"{floor['int8_ops_per_s'].median / 1e9:.0f} GOP/s; a decode step reads "
            f"{human_bytes(model['weight_bytes_per_step'])} of weights"
        ),
    ]
