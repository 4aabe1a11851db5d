"""`qcompile plan`: what a model will cost on a chip, estimated before anything is compiled."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table as RichTable

from qcompile.artifact import find_graph
from qcompile.ascend.buckets import BucketOptions, lengths
from qcompile.ascend.chips import chip_named
from qcompile.ascend.cost_by_config import SDPA_EXPORT
from qcompile.ascend.plan import Plan, Row, plan_model
from qcompile.cli.given_path import GivenPath
from qcompile.cli.output_file import CHARTS, OutputFile
from qcompile.report.chart_file import ChartFile, Table
from qcompile.report.numbers import human_bytes, printable
from qcompile.report.plots import Bar, bar_plot
from qcompile.report.whole_tables import print_whole

_COLUMNS = ("bucket", "form", "per call, ms", "per layer, us", "tokens/s", "kernels", "launch", "memory")
_BUCKETS = {"--batch": "1,4,8,16", "--kv-len": "1024", "--prefill-len": "128"}  # unless they are given
_NOTES = (
    "Every number is an estimate: max(work / matrix rate, bytes / bandwidth) + 1.86 us per kernel. Nothing was run.",
    (
        "Ranges come from the two published readings of the memory bandwidth. Measured times of others were 1.2 to 9 times "
        "longer (docs/ascend.md): use the numbers to compare forms, not to promise milliseconds."
    ),
)


@click.command("plan")
@click.argument("directory", type=GivenPath())
@click.option("--target", required=True, metavar="CHIP", help="ascend910b4, ascend310p3, ...")
@click.option(
    "--batch",
    metavar="B,...",
    help=f"Slots of decode graphs; a lowered directory has its own.  [default: {_BUCKETS['--batch']}]",
)
@click.option("--kv-len", metavar="T,...", help=f"KV cache lengths.  [default: {_BUCKETS['--kv-len']}]")
@click.option("--prefill-len", metavar="S,...", help=f"Chunk lengths.  [default: {_BUCKETS['--prefill-len']}]")
@click.option("--before", type=GivenPath(), help="An exporter's graph: count its kernels, not 59 per layer.")
@click.option("--kernels", is_flag=True, help="List the kernels of one layer.")
@click.option("--chart", type=OutputFile(CHARTS), help="Write a page (.html) or picture (.svg).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    directory: Path,
    target: str,
    batch: str | None,
    kv_len: str | None,
    prefill_len: str | None,
    before: Path | None,
    kernels: bool,
    chart: Path | None,
    as_json: bool,
) -> None:
    """Estimate decode steps, prefill chunks and memory of DIRECTORY on a chip: before and after fusion, int8, int4.

    DIRECTORY is what export or optimize wrote. Nothing is compiled and nothing is run: every number is an estimate.
    """
    given = {"--batch": batch, "--kv-len": kv_len, "--prefill-len": prefill_len}
    options = BucketOptions(*(lengths(name, text or _BUCKETS[name]) for name, text in given.items()))
    export = find_graph(before)[0] if before is not None else None
    plan = plan_model(directory, chip_named(target), options, export)
    if plan.lowered_for and any(given.values()):
        names = ", ".join(name for name, text in given.items() if text)
        raise click.UsageError(f"{directory} is lowered and has its own buckets: leave out {names}")
    if chart is not None:
        _chart(plan).write(chart)
        click.echo(f"{chart}: written", err=True)
    if as_json:
        click.echo(json.dumps(plan.record()))
        return
    console = Console(highlight=False)
    table = RichTable(box=None, header_style="dim")
    for index, name in enumerate(_COLUMNS):
        table.add_column(name, justify="left" if index < 2 else "right")
    for row in plan.rows:
        table.add_row(*_cells(row))
    print_whole(console, table)
    if kernels:
        print_whole(console, _kernel_table(plan))
    for line in _lines(plan):
        console.print(line, markup=False, soft_wrap=True)


def _cells(row: Row) -> list[str]:
    time, layer, memory = row.cost.time, row.layer, row.memory
    total = human_bytes(memory.weights + memory.cache + memory.workspace)
    return [
        row.bucket.name,
        row.form,
        f"{time.low * 1e3:.2f} - {time.high * 1e3:.2f}",
        f"{layer.low * 1e6:.0f} - {layer.high * 1e6:.0f}",
        f"{row.tokens_per_s[0]:.0f} - {row.tokens_per_s[1]:.0f}",
        f"{row.cost.kernels} ({row.cost.launch_bound} launch-bound)",
        f"{row.cost.launch_share:.0%}",
        total if memory.fits else f"{total}: does not fit",
    ]


def _kernel_table(plan: Plan) -> RichTable:
    name, kernels = next(iter(plan.kernels.items()))
    table = RichTable(title=f"\nFirst layer of {name}, estimated", title_justify="left", box=None, header_style="dim")
    for column in ("kernel", "operator", "us", "of it launch"):
        table.add_column(column, justify="left" if column in {"kernel", "operator"} else "right")
    for kernel, time in kernels:
        span = f"{time.low * 1e6:.1f} - {time.high * 1e6:.1f}"
        table.add_row(printable(kernel.name), printable(kernel.op), span, f"{1.86e-6 / time.low:.0%}")
    return table


def _lines(plan: Plan) -> list[str]:
    source = "the lowered graphs" if plan.is_from_graphs else "the config, in the form the lowering gives it"
    counted = " (a public project's count for an export)" if plan.kernels_before == SDPA_EXPORT else ""
    low, high = (f"{reading / 1e12:g}" for reading in plan.chip.bandwidth)
    is_elsewhere = plan.lowered_for not in {"", plan.chip.target}
    note = (
        f"note: the graphs were lowered for {plan.lowered_for}, not {plan.chip.target}; `qcompile optimize --target "
        f"{plan.chip.target}` may give them another form"
    )
    return [
        *([note] if is_elsewhere else []),
        f"after fusion: read off {source}; before fusion: {plan.kernels_before} kernels per layer{counted}",
        f"{plan.chip.name}: bandwidth {low} to {high} TB/s, {human_bytes(plan.chip.usable_bytes)} for a program",
        f"ATC will want about {human_bytes(plan.atc_bytes)} of memory (an estimate)",
        *_NOTES,
    ]


def _chart(plan: Plan) -> ChartFile:
    plots = []
    for name in dict.fromkeys(row.bucket.name for row in plan.rows):
        bars = [
            Bar(
                row.form,
                row.cost.time.high * 1e3,
                f"{row.cost.time.low * 1e3:.2f} - {row.cost.time.high * 1e3:.2f} ms",
                row.cost.roofline.high * 1e3,
            )
            for row in plan.rows
            if row.bucket.name == name
        ]
        plots.append(
            bar_plot(f"{name}: estimated ms per call (dashed: roofline without launches)", bars, unit="ms, estimate")
        )
    rows = [_cells(row) for row in plan.rows]
    cards = [("chip", plan.chip.name), ("estimate", "not measured")]
    title = f"{plan.directory} on {plan.chip.name}, estimated"
    return ChartFile("qcompile plan", title, cards, plots, [Table("Estimates", _COLUMNS, rows)], _lines(plan))
