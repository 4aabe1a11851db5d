"""`qcompile check`: would ATC take this graph, and would the chip run it as it is meant."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape

from qcompile.ascend.chips import cann_version, chip_named
from qcompile.ascend.inputs import onnx_graphs
from qcompile.ascend.legality.check import check_model
from qcompile.ascend.legality.finding import Effect, Finding, Report
from qcompile.ascend.legality.rule import AtcOptions
from qcompile.ascend.plugins import PLUGINS
from qcompile.ascend.shapes import parse_input_shapes
from qcompile.cli.ascend_options import plugin_names
from qcompile.cli.given_path import GivenPath
from qcompile.report.numbers import printable

_SHOWN = 3
_WORDS = {
    (Effect.REFUSED, True): ("red", "refused"),
    (Effect.REFUSED, False): ("red", "may be refused"),
    (Effect.WRONG, True): ("red", "compiles, wrong result"),
    (Effect.WRONG, False): ("red", "compiles, doubtful result"),
    (Effect.SLOW, True): ("yellow", "slow"),
    (Effect.SLOW, False): ("yellow", "may be slow"),
}


@click.command("check")
@click.argument("model", type=GivenPath())
@click.option("--target", required=True, metavar="CHIP", help="ascend910b4, ascend310p3, ascend310b4, ...")
@click.option(
    "--cann", default="8.1", show_default=True, metavar="VERSION", help="Release of CANN that will compile it."
)
@click.option("--input-shape", default="", metavar="NAMES", help="As ATC takes it: 'input_ids:1,128;mask:1,2048'.")
@click.option("--dynamic-dims", default="", metavar="GEARS", help="As ATC takes it: '1,1024;4,1024'.")
@click.option("--precision-mode", default="", metavar="MODE", help="As ATC takes it.")
@click.option("--precision-mode-v2", default="", metavar="MODE", help="As ATC takes it.")
@click.option(
    "--plugins",
    default="",
    callback=plugin_names,
    metavar="NAME,...",
    help=f"Parser plugins installed there: all, {', '.join(PLUGINS)}.",
)
@click.option("--all", "show_all", is_flag=True, help="List every node, not the first three of a kind.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: Path,
    target: str,
    cann: str,
    input_shape: str,
    dynamic_dims: str,
    precision_mode: str,
    precision_mode_v2: str,
    plugins: frozenset[str],
    show_all: bool,
    as_json: bool,
) -> None:
    """Say what ATC would refuse in MODEL, an .onnx file or a compiled-model directory; no CANN is needed.

    Exit code 1 when something is refused or would compute something else; slow nodes alone leave it 0.
    """
    options = AtcOptions(
        precision_mode=precision_mode,
        precision_mode_v2=precision_mode_v2,
        input_shapes=parse_input_shapes(input_shape),
        dynamic_dims=dynamic_dims,
        plugins=plugins,
    )
    chip, release = chip_named(target), cann_version(cann)
    reports = [check_model(path, chip, release, options) for path in onnx_graphs(model)]
    if as_json:
        click.echo(json.dumps({"legal": all(r.is_legal for r in reports), "graphs": [r.record() for r in reports]}))
    else:
        console = Console(highlight=False, soft_wrap=True)
        for report in reports:
            _show(console, report, show_all)
    if not all(report.is_legal for report in reports):
        raise click.exceptions.Exit(1)


def _show(console: Console, report: Report, show_all: bool) -> None:
    for warning in report.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}")
    kinds = sorted(report.findings, key=lambda f: (not f.stops, not f.certain, f.rule, f.op, f.wanted, f.cure))
    for _, group in groupby(kinds, key=lambda f: (f.effect, f.certain, f.rule, f.op, f.wanted, f.cure)):
        _show_kind(console, list(group), show_all)
    stopping = sum(finding.stops for finding in report.findings)
    verdict = "[red]would not compile as meant[/]" if stopping else "[green]nothing ATC would refuse[/]"
    counts = f"{stopping} findings that stop it, {len(report.findings) - stopping} that slow it down"
    path = escape(printable(report.graph))
    console.print(f"{path}: {verdict} for {report.soc_version}, CANN {report.cann}: {counts}, {report.num_nodes} nodes")


def _show_kind(console: Console, findings: list[Finding], show_all: bool) -> None:
    first = findings[0]
    colour, words = _WORDS[first.effect, first.certain]
    code = f"{first.code} " if first.code else ""
    op = f" {first.op}" if first.op else ""
    times = f" ({len(findings)} times)" if len(findings) > 1 else ""
    console.print(f"[{colour}]{code}{words}[/] {escape(printable(f'{first.rule}:{op}{times}'))}")
    shown = findings if show_all else findings[:_SHOWN]
    for finding in shown:
        layer = f" (layer {finding.layer})" if finding.layer and finding.layer != finding.node else ""
        where = f"{finding.node}{layer}: " if finding.node else ""
        console.print(f"    {escape(printable(f'{where}{finding.seen}'))}")
    if len(findings) > len(shown):
        console.print(f"    ... and {len(findings) - len(shown)} more; --all lists them")
    console.print(f"    wanted: {escape(printable(first.wanted))}")
    console.print(f"    cure: {escape(printable(first.cure))}")
