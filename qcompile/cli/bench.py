"""`qcompile bench`: how fast a compiled model is here, and how far from what the machine allows."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from qcompile.benchmark.presentation import render, write_chart
from qcompile.benchmark.report import BenchReport
from qcompile.benchmark.run import BenchOptions, run_benchmark
from qcompile.cli.given_path import GivenPath
from qcompile.cli.output_file import CHARTS, OutputFile
from qcompile.report.whole_tables import print_whole
from qcompile.runtime.host import MAX_THREADS


@click.command("bench")
@click.argument("directory", metavar="DIR", type=GivenPath())
@click.option("--quick", is_flag=True, help="Fewer cases, one round: an idea in a minute or two.")
@click.option("--repetitions", type=click.IntRange(1, 100), help="Rounds of all cases  [default: 3, or 1 with --quick]")
@click.option("--threads", type=click.IntRange(1, MAX_THREADS), help="Computing threads  [default: all cores]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--html", "--chart", "chart", type=OutputFile(CHARTS), help="Write a page (.html) or a picture (.svg).")
def command(
    directory: Path, quick: bool, repetitions: int | None, threads: int | None, as_json: bool, chart: Path | None
) -> None:
    """Time the compiled model in DIR.

    Prefill at 128 and 1,024 tokens, decode at batch 1, 4 and 8 behind as many, time to the first token, loading, peak
    memory (each in a fresh process), and the floor: what this machine's memory bandwidth and matrix rate allow.
    """
    report = _run(directory, BenchOptions(quick, repetitions, threads))
    if as_json:
        click.echo(json.dumps(report.record(), ensure_ascii=True))
    else:
        print_whole(Console(highlight=False), render(report))
    if chart is not None:  # last: what was measured is told even if it cannot be written
        write_chart(report, chart)
        click.echo(f"{chart}: written", err=True)


def _run(directory: Path, options: BenchOptions) -> BenchReport:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None)

        def say(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        return run_benchmark(directory, options, say)
