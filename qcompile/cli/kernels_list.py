"""`qcompile kernels list`: which fused operators there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qcompile.cli.given_path import GivenPath
from qcompile.kernel_check.operators import Operator, read_operators
from qcompile.kernels.tile_table import KernelTable
from qcompile.report.numbers import printable
from qcompile.report.whole_tables import print_whole

_COLUMNS = ("kernel", "core", "types", "tiles", "refused tile")


@click.command("list")
@click.option("--kernels", "folder", type=GivenPath(), help="Another folder of operators.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(folder: Path | None, as_json: bool) -> None:
    """List the fused operators: their kernels, types, block sizes, and where they are described."""
    operators = read_operators(folder)
    if as_json:
        click.echo(json.dumps({"operators": [_record(operator) for operator in operators]}, indent=1))
        return
    console = Console(highlight=False, soft_wrap=True)
    for operator in operators:
        readme = operator.folder / "README.md"
        where = f" ({readme})" if readme.is_file() else ""
        console.print(Text.assemble((operator.name, "bold"), f": {printable(operator.summary)}{where}"))
        print_whole(console, _table(operator))


def _table(operator: Operator) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2))
    for column in _COLUMNS:
        table.add_column(column, no_wrap=True)
    for kernel in operator.kernels:
        tiles = ["\n".join(tile.label for tile in kernel.tiles if tile.expect == e) for e in ("ok", "overflow")]
        table.add_row(*(Text(cell) for cell in (kernel.function, kernel.core, " ".join(kernel.variants), *tiles)))
    return table


def _record(operator: Operator) -> dict[str, Any]:
    return {
        "name": operator.name,
        "summary": operator.summary,
        "folder": str(operator.folder),
        "kernels": [_kernel_record(kernel) for kernel in operator.kernels],
    }


def _kernel_record(kernel: KernelTable) -> dict[str, Any]:
    return {
        "function": kernel.function,
        "core": kernel.core,
        "chips": list(kernel.chips),
        "signature": dict(kernel.signature),
        "variants": {name: dict(letters) for name, letters in kernel.variants.items()},
        "tiles": [
            {
                "constants": dict(tile.constants),
                "expect": tile.expect,
                "budget_bytes": dict(tile.budget_bytes),
                "variants": list(tile.variants),
            }
            for tile in kernel.tiles
        ],
    }
