"""Write a report of tables and plots: a self-contained HTML page, or the plots alone as SVG.

No script, no network; text from models and files is escaped.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path

from qcompile import __version__
from qcompile.errors import ArtifactError
from qcompile.report.numbers import printable
from qcompile.report.plots import stacked
from qcompile.weights_writer import write_failure

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = "svg{max-width:100%;height:auto;display:block;color:var(--ink);margin:8px 0 14px}td.note{color:var(--soft)}"


@dataclass(frozen=True)
class Table:
    """Rows of text; columns after the first are numbers and stand on the right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    has_numbers: bool = True


@dataclass(frozen=True)
class ChartFile:
    """What a page shows, from top to bottom.

    Attributes:
        command: The command it comes from.
        title: What was measured.
        cards: Label and figure, large, at the top.
        plots: SVG texts.
        tables: Below the plots.
        notes: Sentences at the end.
    """

    command: str
    title: str
    cards: Sequence[tuple[str, str]]
    plots: Sequence[str]
    tables: Sequence[Table]
    notes: Sequence[str] = ()

    def write(self, path: Path) -> None:
        """Write `path`: SVG when it ends so, else HTML.

        Raises:
            ArtifactError: It cannot be written; an older file is left as it was.
        """
        text = stacked(self.plots) if path.suffix.lower() == ".svg" else self.html()
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            raise ArtifactError(write_failure(path, error)) from error
        finally:
            temporary.unlink(missing_ok=True)

    def html(self) -> str:
        """Return the page."""
        style = (resources.files("qcompile.report") / "page.css").read_text(encoding="utf-8")
        cards = "".join(
            f'<div class="total"><span>{escape(label)}</span><p><b>{escape(figure)}</b></p></div>'
            for label, figure in self.cards
        )
        plots = "".join(f'<section class="chart">{plot}</section>' for plot in self.plots)
        notes = "".join(f"<p>{escape(printable(note))}</p>" for note in self.notes)
        return (
            '<!doctype html>\n<html lang="en" data-lang="en" data-theme="auto">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)} · {escape(self.command)}</title>\n<style>\n{style}{_STYLE}</style>\n</head>\n"
            f'<body>\n<header><div class="name"><span class="mark">{escape(self.command)}</span>'
            f"<h1>{escape(printable(self.title))}</h1></div></header>\n"
            f'<div class="totals">{cards}</div>\n{plots}\n{"".join(map(_table, self.tables))}\n{notes}\n'
            f"<footer>qcompile {escape(__version__)}</footer>\n</body>\n</html>\n"
        )


def _table(table: Table) -> str:
    kind = ' class="n"' if table.has_numbers else ""
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = []
    for first, *rest in table.rows:
        cells = "".join(f"<td{kind}>{escape(printable(cell))}</td>" for cell in rest)
        rows.append(f"<tr><td>{escape(printable(first))}</td>{cells}</tr>")
    return (
        f'<section class="chart"><h2>{escape(table.title)}</h2><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></section>"
    )
