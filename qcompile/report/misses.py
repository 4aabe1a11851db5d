"""Why a fusion did not fire: the places where it almost did."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from qcompile.passes import registry
from qcompile.passes.base import PassContext, Rejection
from qcompile.passes.schedule import schedule_up_to
from qcompile.report.numbers import printable
from qcompile.report.sorted_copy import sorted_copy


def nearest_misses(model: ir.Model, name: str) -> list[Rejection]:
    """Return where a pass, or a pass of a group, almost applied and what was in the way.

    What comes before it in a pipeline (clean, canonicalize, fuse) and it itself run on a copy, without
    numerical proofs; what it refused there, and what still resembles its patterns, are the misses.

    Raises:
        PassError: The name is unknown.
    """
    wanted = set(registry.expand([name]))
    context = PassContext(sorted_copy(model), None)
    misses: dict[tuple[str, str, str], Rejection] = {}
    for step in schedule_up_to(name):
        run = step()
        result = run(context)
        if step.name in wanted:
            for miss in (*result.rejected, *run.explain(context)):
                misses.setdefault((miss.node, miss.rule, miss.reason), miss)
    return list(misses.values())


def render_misses(name: str, misses: Sequence[Rejection]) -> RenderableType:
    """Return the misses as a table, or a line saying that there are none."""
    if not misses:
        return Text(f"{name}: no near misses; every place it looks at has been rewritten or does not resemble it")
    table = Table(title=f"Nearest misses of {name}", title_justify="left", box=None, header_style="dim")
    for column in ("node", "rule", "reason"):
        table.add_column(column, overflow="fold")
    for miss in misses:
        table.add_row(*(Text(printable(text)) for text in (miss.node, miss.rule, miss.reason)))
    return table
