"""A quality report for people: terminal tables, and the page or picture."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from qcompile.quality.compare import QualityReport
from qcompile.quality.divergence import Summary
from qcompile.quality.layers import HalfBlock
from qcompile.quality.record import histogram
from qcompile.report.chart_file import ChartFile, Table
from qcompile.report.numbers import human_bytes, printable
from qcompile.report.plots import Bar, Line, bar_plot, column_plot, line_plot

_COLUMNS = ("text", "tokens", "ppl A", "ppl B", "mean KL", "±", "median", "99 %", "top-1")


def render(report: QualityReport) -> RenderableType:
    """Return the terminal tables."""
    parts: list[RenderableType] = [Text(line) for line in _models(report)]
    parts.append(_rich(_summary_table(report)))
    if report.greedy:
        parts.append(_rich(_greedy_table(report)))
    parts.append(Text(layer_sentence(report)))
    parts += [Text(f"note: {printable(note)}", style="dim") for note in report.notes]
    return Group(*parts)


def layer_sentence(report: QualityReport) -> str:
    """Say in one line where the two first differ."""
    layers = report.layers
    if not layers.blocks:
        return f"first divergence: not looked at: {layers.reason}"
    first, step = layers.first_divergence, layers.largest_step
    if first is None:
        largest = max(b.max_difference for b in layers.blocks)
        return f"first divergence: none; hidden states differ by at most {largest:.1e} (limit {layers.limit:.0e})"
    assert step is not None
    return (
        f"first divergence: {_place(first)} (relative difference up to {first.max_difference:.1e}, limit "
        f"{layers.limit:.0e}); the largest step is {_place(step)}, the last layer ends at "
        f"{layers.blocks[-1].mean_difference:.1e} on average"
    )


def write_chart(report: QualityReport, path: Path) -> None:
    """Write the page, or the picture when `path` ends in .svg.

    Raises:
        ArtifactError: It cannot be written.
    """
    chart_of(report).write(path)


def chart_of(report: QualityReport) -> ChartFile:
    """Return the page's content."""
    overall = report.overall
    cards = [
        ("mean KL", f"{overall.mean_kl:.3g}"),
        ("top-1 agreement", f"{overall.top1_agreement:.2%}"),
        ("perplexity", f"{overall.reference_perplexity:.4g} → {overall.other_perplexity:.4g}"),
        ("tokens", f"{overall.num_tokens:,}"),
        ("size", f"{human_bytes(report.reference['size_bytes'])} → {human_bytes(report.other['size_bytes'])}"),
    ]
    tables = [_summary_table(report)]
    if report.greedy:
        tables.append(_greedy_table(report))
    if report.worst:
        rows = [[f"{w.kl:.3g}", w.group, str(w.position), f"…{w.before}", w.token] for w in report.worst]
        columns = ("KL", "text", "position", "after", "token")
        tables.append(Table("Where the two differ most", columns, rows, has_numbers=False))
    title = f"{report.reference['path']} → {report.other['path']}"
    notes = [*_models(report), layer_sentence(report), *report.notes]
    return ChartFile("qcompile quality", title, cards, _plots(report), tables, notes)


def _plots(report: QualityReport) -> list[str]:
    counted = histogram(report.scores.kl)
    labels = [f"{edge:.0e}" for edge in counted["edges"][:-1]]
    counts = [int(c) for c in counted["counts"]]
    plots = [column_plot("Tokens by KL", "KL(A || B) per token, nats", labels, counts)]
    if report.layers.blocks:
        names = [f"{b.layer}{'a' if b.part == 'attention' else 'm'}" for b in report.layers.blocks]
        lines = [
            Line("mean", [b.mean_difference for b in report.layers.blocks]),
            Line("largest", [b.max_difference for b in report.layers.blocks]),
        ]
        title = "Relative difference of the hidden states"
        plots.append(line_plot(title, "after layer", names, lines, log=True, limit=report.layers.limit))
    if len(report.groups) > 1:
        bars = [Bar(name, s.mean_kl, f"{s.mean_kl:.3g}") for name, s in report.groups.items()]
        plots.append(bar_plot("Mean KL by text", bars, unit="nats per token"))
    return plots


def _models(report: QualityReport) -> list[str]:
    lines = []
    for letter, model in (("A", report.reference), ("B", report.other)):
        size = human_bytes(model["size_bytes"])
        lines.append(f"{letter} {printable(model['path'])}: {model['target']}, {model['dtype']} cache, {size}")
    text = report.text
    lines.append(
        f"text {printable(text['source'])}: {text['num_tokens']:,} of {text['num_available']:,} tokens, windows of "
        f"{text['context']} every {text['stride']}"
    )
    return lines


def _summary_table(report: QualityReport) -> Table:
    rows = [_summary_row(name, summary) for name, summary in report.groups.items()] if len(report.groups) > 1 else []
    return Table("Distributions, token by token", _COLUMNS, [*rows, _summary_row("all", report.overall)])


def _summary_row(name: str, s: Summary) -> list[str]:
    return [
        name,
        f"{s.num_tokens:,}",
        f"{s.reference_perplexity:.4g}",
        f"{s.other_perplexity:.4g}",
        f"{s.mean_kl:.3g}",
        f"{s.kl_standard_error:.1g}",
        f"{s.median_kl:.3g}",
        f"{s.p99_kl:.3g}",
        f"{s.top1_agreement:.2%}",
    ]


def _greedy_table(report: QualityReport) -> Table:
    rows = [[g.group, str(g.num_prompt_tokens), str(g.num_tokens), str(g.num_same)] for g in report.greedy]
    return Table("Greedy answers", ("prompt", "its tokens", "A wrote", "the same before a difference"), rows)


def _place(block: HalfBlock) -> str:
    return f"layer {block.layer}, {'attention' if block.part == 'attention' else 'feed-forward'}"


def _rich(table: Table) -> RichTable:
    shown = RichTable(title=table.title, title_justify="left", box=None, header_style="dim", pad_edge=False)
    for i, column in enumerate(table.columns):
        shown.add_column(column, justify="right" if i else "left")
    for row in table.rows:
        shown.add_row(*(Text(printable(cell)) for cell in row))
    return shown
