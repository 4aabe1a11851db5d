"""`qcompile inspect`: what is in a graph, two graphs side by side, and why a fusion did not fire."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import onnx_ir as ir
from rich.console import Console

from qcompile.artifact import find_graph, load_model
from qcompile.cli.given_path import GivenPath
from qcompile.cli.output_file import OutputFile
from qcompile.report.page import write_page
from qcompile.report.summary import ModelSummary, summarize
from qcompile.report.terminal import render
from qcompile.report.whole_tables import print_whole


@click.command("inspect")
@click.argument("model", type=GivenPath())
@click.argument("other", type=GivenPath(), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--html", type=OutputFile(), help="Write a page with the graph drawn.")
@click.option("--why", metavar="PASS", help="List the nearest misses of a fusion pass, with reasons.")
def command(model: Path, other: Path | None, as_json: bool, html: Path | None, why: str | None) -> None:
    """Show operators, parameters, inputs and outputs of MODEL, next to those of OTHER.

    MODEL and OTHER are .onnx files or compiled-model directories. MODEL may also be an .om file of CANN's compiler.
    """
    if model.suffix == ".om":
        _inspect_om(model, alone=other is None and html is None and why is None, as_json=as_json)
        return
    if why is not None and (other is not None or html is not None):
        raise click.UsageError("--why takes one model and no --html")
    console = Console(highlight=False)
    if why is not None:
        from qcompile.report.misses import nearest_misses, render_misses  # the passes: slow to import

        graph, _ = _read(model)
        misses = nearest_misses(graph, why)
        if as_json:
            click.echo(_as_json({"pass": why, "misses": [vars(miss) for miss in misses]}))
        else:
            print_whole(console, render_misses(why, misses))
        return
    read = [_read(path) for path in (model, other) if path is not None]
    if html is not None:
        write_page(read, html)
    if as_json:
        click.echo(_as_json({"models": [summary.record() for _, summary in read]}))
    else:
        print_whole(console, render([summary for _, summary in read]))
    if html is not None:
        click.echo(f"{html}: written", err=True)


def _inspect_om(path: Path, *, alone: bool, as_json: bool) -> None:
    if not alone:
        raise click.UsageError("an .om file is shown alone: no second model, --html or --why")
    from qcompile.ascend.om_reader import read_om
    from qcompile.ascend.om_report import om_record, render_om

    om = read_om(path)
    if as_json:
        click.echo(_as_json(om_record(om)))
    else:
        print_whole(Console(highlight=False), render_om(om))


def _read(path: Path) -> tuple[ir.Model, ModelSummary]:
    graph_path, manifest = find_graph(path)
    model = load_model(graph_path)
    return model, summarize(model, graph_path, manifest)


def _as_json(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=2, ensure_ascii=True)
