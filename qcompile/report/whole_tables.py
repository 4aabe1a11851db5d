"""Print tables with every number whole, and lines unbroken, however narrow the terminal is."""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table

_UNBOUNDED = 100_000
_WORDS = 40  # characters a column of words keeps when it must be folded


def print_whole(console: Console, part: RenderableType) -> None:
    """Print a table, a text, or a group of them.

    rich fits every table to the console, which without a terminal is 80 columns wide: 73728 came out as 7372. Here a
    column that is justified right (numbers), or that does not wrap, keeps its width; words are folded, and what is
    still wider than the console is printed as wide as it is. A text keeps its lines: a path in a note stays one word.
    """
    if isinstance(part, Group):
        for inner in part.renderables:
            print_whole(console, inner)
    elif isinstance(part, Table):
        console.print(_Whole(part), crop=False)
    else:
        console.print(part, soft_wrap=True)


class _Whole:
    def __init__(self, table: Table) -> None:
        self.table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unbounded = options.update(width=_UNBOUNDED)
        for column in self.table.columns:
            _keep_whole(column, console, unbounded)
        least = Measurement.get(console, unbounded, self.table).minimum
        yield from console.render(self.table, options.update(width=max(options.max_width, least)))


def _keep_whole(column: Column, console: Console, options: ConsoleOptions) -> None:
    cells = [column.header, *column.cells]
    widest = max(Measurement.get(console, options, cell).maximum for cell in cells)
    column.no_wrap = column.no_wrap or column.justify == "right"
    column.min_width = widest if column.no_wrap else min(widest, _WORDS)
    column.overflow = "fold"
