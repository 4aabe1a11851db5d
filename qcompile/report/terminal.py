"""Summaries as terminal tables: one model, or two side by side."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qcompile.report.numbers import compact_count, human_bytes, human_change, printable
from qcompile.report.summary import GraphPort, ModelSummary

_LAYER_INDEX = re.compile(r"^(.*?\.)(\d+)(\..*|)$")


def render(summaries: Sequence[ModelSummary]) -> RenderableType:
    """Return the tables for one summary, or for two with their difference."""
    parts: list[RenderableType] = [_totals(summaries), _ops(summaries), _weights(summaries)]
    if any(s.functions for s in summaries):
        parts.append(_functions(summaries))
    parts += [_interface(summary, heading=len(summaries) > 1) for summary in summaries]
    return Group(*parts)


def _table(title: str, names: Iterable[str], summaries: Sequence[ModelSummary]) -> Table:
    table = _titled(title)
    for name in names:
        table.add_column(name)
    for label in column_labels(summaries):
        table.add_column(Text(label), justify="right")
    if len(summaries) > 1:
        table.add_column("change", justify="right")
    return table


def _titled(title: str) -> Table:
    return Table(
        title=Text(f"\n{title}"),
        title_justify="left",
        title_style="bold",
        header_style="dim",
        box=None,
        min_width=48,
    )


def column_labels(summaries: Sequence[ModelSummary]) -> list[str]:
    """Return a short heading per model: the shortest ends of the paths that differ."""
    if len(summaries) == 1:
        return [""]
    split = [printable(s.path).split("/") for s in summaries]
    if split[0] == split[1]:
        return ["first", "second"]
    while all(split) and split[0][-1] == split[1][-1]:
        split = [split[0][:-1], split[1][:-1]]
    return [parts[-1] for parts in split] if all(split) else [printable(s.path) for s in summaries]


def _compare(
    table: Table,
    label: str,
    values: Sequence[int],
    show: Callable[[int], str] = "{:,}".format,
) -> None:
    cells = [show(value) if value else "-" for value in values]
    if len(values) > 1:
        cells.append(human_change(*values))
    table.add_row(Text(label), *cells)


def _totals(summaries: Sequence[ModelSummary]) -> Table:
    table = _table("Totals", [""], summaries)
    _compare(table, "nodes", [s.num_nodes for s in summaries])
    _compare(table, "operator types", [len(s.ops) for s in summaries])
    _compare(table, "parameters", [s.parameters for s in summaries], compact_count)
    _compare(table, "weight bytes", [s.weight_bytes for s in summaries], human_bytes)
    texts: list[tuple[str, Callable[[ModelSummary], str]]] = [
        ("opset", lambda s: ", ".join(f"{d or 'ai.onnx'} {v}" for d, v in s.opsets.items())),
        ("producer", lambda s: s.producer or "-"),
        ("target", lambda s: s.target or "-"),
    ]
    for label, text in texts:
        table.add_row(label, *(Text(printable(text(s))) for s in summaries))
    return table


def _ops(summaries: Sequence[ModelSummary]) -> Table:
    table = _table("Operators", [""], summaries)
    names = {name: max(s.ops.get(name, 0) for s in summaries) for s in summaries for name in s.ops}
    for name in sorted(names, key=lambda n: (-names[n], n)):
        _compare(table, printable(name), [s.ops.get(name, 0) for s in summaries])
    return table


_WEIGHT_COLUMNS: tuple[tuple[str, str, Callable[[int], str]], ...] = (
    ("tensors", "tensors", "{:,}".format),
    ("elements", "elements", compact_count),
    ("size_bytes", "bytes", human_bytes),
)


def _weights(summaries: Sequence[ModelSummary]) -> Table:
    title = "Weights by dtype (shared ones once)"
    if len(summaries) == 1:
        return _weights_of_one(title, summaries[0])
    table = _table(title, ["", ""], summaries)
    for dtype in sorted({name for s in summaries for name in s.weights}):
        for kind, label, show in _WEIGHT_COLUMNS:
            values = [getattr(s.weights[dtype], kind) if dtype in s.weights else 0 for s in summaries]
            cells = [show(value) if value else "-" for value in values]
            table.add_row(dtype if kind == "tensors" else "", label, *cells, human_change(*values))
    return table


def _weights_of_one(title: str, summary: ModelSummary) -> Table:
    table = _titled(title)
    table.add_column("")
    for _, label, _ in _WEIGHT_COLUMNS:
        table.add_column(label, justify="right")
    for dtype, total in summary.weights.items():
        table.add_row(dtype, *(show(getattr(total, kind)) for kind, _, show in _WEIGHT_COLUMNS))
    return table


def _functions(summaries: Sequence[ModelSummary]) -> Table:
    table = _table("Functions (calls)", [""], summaries)
    names = list(dict.fromkeys((f.domain, f.name) for s in summaries for f in s.functions))
    for domain, name in names:
        calls = [sum(f.calls for f in s.functions if (f.domain, f.name) == (domain, name)) for s in summaries]
        _compare(table, printable(f"{domain}::{name}"), calls)
    return table


def _interface(summary: ModelSummary, *, heading: bool) -> Table:
    title = f"Inputs and outputs of {printable(summary.path)}" if heading else "Inputs and outputs"
    table = _titled(title)
    table.show_header = False
    for direction, tensors in (("in", summary.inputs), ("out", summary.outputs)):
        for name, dtype, shape in group_by_layer(tensors):
            table.add_row(direction, Text(printable(name)), dtype, Text(printable(shape)))
    return table


def group_by_layer(tensors: Sequence[GraphPort]) -> list[tuple[str, str, str]]:
    """Return (name, dtype, shape) rows; names that differ in one layer number alone share a row."""
    rows: dict[tuple[str, str, str, str], list[int]] = {}
    for tensor in tensors:
        match = _LAYER_INDEX.match(tensor.name)
        before, index, after = match.groups() if match else (tensor.name, "", "")
        key = (before, after, tensor.dtype, shape_text(tensor.shape))
        rows.setdefault(key, []).append(int(index) if index else -1)
    return [
        (f"{before}{_index_range(indices)}{after}", dtype, shape)
        for (before, after, dtype, shape), indices in rows.items()
    ]


def _index_range(indices: list[int]) -> str:
    if indices == [-1] * len(indices):
        return ""
    if len(indices) == 1:
        return str(indices[0])
    return f"{{{indices[0]}…{indices[-1]}}}"


def shape_text(shape: tuple[int | str | None, ...] | None) -> str:
    """Return a shape as `[batch_size, 2, ?, 64]`, or `?` when even the rank is unknown."""
    return "?" if shape is None else f"[{', '.join('?' if dim is None else str(dim) for dim in shape)}]"
