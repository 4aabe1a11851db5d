"""`qcompile doctor`: what this machine can do, and what to do about each gap."""

from __future__ import annotations

import json

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qcompile.ascend.doctor import Status, diagnose
from qcompile.report.numbers import printable

_COLOURS = {Status.OK: "green", Status.NOTE: "yellow", Status.GAP: "red"}


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """Look for ONNX Runtime, CANN, atc, acl, the driver and an NPU, and list which NPU operators CANN registers."""
    diagnosis = diagnose()
    if as_json:
        click.echo(json.dumps(diagnosis.record(), indent=1))
        return
    table = Table(box=None, header_style="dim")
    for name in ("", "what", "found", "what to do"):
        table.add_column(name, overflow="fold")
    for check in diagnosis.checks:
        found, cure = Text(printable(check.found)), Text(printable(check.cure))
        table.add_row(f"[{_COLOURS[check.status]}]{check.status.value}[/]", check.name, found, cure)
    console = Console(highlight=False)
    console.print(table)
    for ability, can in diagnosis.abilities.items():
        console.print(f"{'[green]can[/]' if can else '[red]cannot[/]'} {ability}")
