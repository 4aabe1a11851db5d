"""`qcompile quality`: how far one model's answers are from another's."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qcompile.cli.given_path import GivenPath
from qcompile.cli.output_file import CHARTS, OutputFile
from qcompile.quality.compare import CompareOptions, QualityReport, compare_models
from qcompile.quality.presentation import render, write_chart
from qcompile.quality.record import record_of
from qcompile.report.whole_tables import print_whole
from qcompile.runtime.host import MAX_THREADS


@click.command("quality")
@click.argument("reference", metavar="A", type=GivenPath())
@click.argument("other", metavar="B", type=GivenPath())
@click.option("--data", type=GivenPath(), help="Text or .jsonl to read; by default a built-in set.")
@click.option("--prompts", type=GivenPath(), help="Text or .jsonl of prompts for the greedy comparison.")
@click.option("--tokens", default=20_000, show_default=True, type=click.IntRange(min=1), help="Most tokens to score.")
@click.option(
    "--context", type=click.IntRange(min=2), help="Tokens seen at once  [default: 1024, or the models' limit]"
)
@click.option("--stride", type=click.IntRange(min=1), help="From window to window  [default: half the context]")
@click.option(
    "--chunk",
    default=128,
    show_default=True,
    type=click.IntRange(1, 4096),
    help="Tokens per forward pass; 1 compares the kernels of decoding.",
)
@click.option(
    "--greedy", default=64, show_default=True, type=click.IntRange(0, 4096), help="Tokens to write per prompt; 0: none."
)
@click.option("--no-layers", is_flag=True, help="Do not look at the hidden states.")
@click.option("--threads", type=click.IntRange(1, MAX_THREADS), help="Computing threads  [default: all cores]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--html", "--chart", "chart", type=OutputFile(CHARTS), help="Write a page (.html) or a picture (.svg).")
def command(
    reference: Path,
    other: Path,
    data: Path | None,
    prompts: Path | None,
    tokens: int,
    context: int | None,
    stride: int | None,
    chunk: int,
    greedy: int,
    no_layers: bool,
    threads: int | None,
    as_json: bool,
    chart: Path | None,
) -> None:
    """Compare model B with model A on the same text.

    A and B are compiled-model directories, .onnx files, or checkpoints (a Hugging Face directory or a .gguf file, exported
    to fp32 and kept in the cache). Perplexity of both, KL(A || B) per token, how often both put the same token first,
    how long they write the same answer, and the first layer in which their hidden states part.
    """
    options = CompareOptions(data, prompts, tokens, context, stride, chunk, greedy, not no_layers, threads)
    report = _compare(reference, other, options)
    if as_json:
        click.echo(json.dumps(record_of(report), ensure_ascii=True, allow_nan=False))
    else:
        print_whole(Console(highlight=False), render(report))
    if chart is not None:  # last: what was measured is told even if it cannot be written
        write_chart(report, chart)
        click.echo(f"{chart}: written", err=True)


def _compare(reference: Path, other: Path, options: CompareOptions) -> QualityReport:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("opening", total=None)

        def say(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        return compare_models(reference, other, options, say)
