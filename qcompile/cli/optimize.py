"""`qcompile optimize`: fuse, quantize and lower a model."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from qcompile.cli.ascend_options import ascend_options, names_ascend_options, take_ascend_options
from qcompile.cli.given_path import GivenPath
from qcompile.cli.output_file import CHARTS, OutputFile
from qcompile.cli.quantization_options import quantization_options, quantize_options
from qcompile.errors import PassError
from qcompile.optimize_recipe import load_optimize_recipe
from qcompile.passes.registry import GROUPS, PASSES
from qcompile.pipeline import VERIFY_LEVELS, OptimizeOptions, OptimizeReport, optimize
from qcompile.report.whole_tables import print_whole
from qcompile.target import TARGETS

_SHOWN_REJECTIONS = 5


@click.command("optimize", epilog=f"Groups: {', '.join(GROUPS)}. Passes: {', '.join(PASSES)}.")
@click.argument("model", type=GivenPath(exists=True))
@click.option("--passes", help="Passes and groups, separated by commas.  [default: fuse]")
@click.option("--skip", help="Passes and groups to leave out.")
@click.option(
    "--recipe",
    type=GivenPath(dir_okay=False, exists=True),
    help="TOML with passes, skip, target, verify, strict, surgery, and tables [quantize] and [ascend].",
)
@click.option("-o", "--output", type=GivenPath(), help="Directory to write; by default beside MODEL.")
@click.option(
    "--target",
    metavar="NAME",
    help=f"Where it will run: {', '.join(TARGETS)}.  [default: ort; portable for bfloat16 models]",
)
@click.option(
    "--verify",
    type=click.Choice(VERIFY_LEVELS),
    help="fast proves every rewrite on the spot; full also compares the whole model, logits and 64 greedy tokens.  "
    "[default: fast]",
)
@click.option(
    "--strict/--no-strict", default=None, help="Fail when a fusion fires less often than the model has places for."
)
@click.option("--surgery", metavar="FILE.py:FUNCTION", help="Run your onnx-graphsurgeon function first.")
@click.option("--report", type=OutputFile(), help="Write the report as JSON.")
@click.option("--layer-chart", type=OutputFile(CHARTS), help="With --quality or --size: write why as .html or .svg.")
@click.option("--dry-run", is_flag=True, help="Do everything but write the model.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@ascend_options
@quantization_options
def command(
    model: Path,
    passes: str | None,
    skip: str | None,
    recipe: Path | None,
    output: Path | None,
    target: str | None,
    verify: str | None,
    strict: bool | None,
    surgery: str | None,
    report: Path | None,
    layer_chart: Path | None,
    dry_run: bool,
    as_json: bool,
    **grouped: Any,
) -> None:
    """Optimize MODEL, an .onnx file or a compiled-model directory, e.g. with --passes fuse,int8."""
    base = load_optimize_recipe(recipe) if recipe is not None else OptimizeOptions()
    given: dict[str, Any] = {
        "passes": None if passes is None else _passes(passes),
        "skip": None if skip is None else _names(skip),
        "target": target,
        "verify": verify,
        "strict": strict,
        "surgery": surgery,
        "layer_chart": layer_chart,
    }
    base = replace(base, dry_run=dry_run, names_ascend=names_ascend_options(grouped))
    options = replace(
        base,
        ascend=take_ascend_options(grouped, base.ascend),
        quantize=quantize_options(grouped, base.quantize),
        **{key: value for key, value in given.items() if value is not None},
    )
    done = _run(model, output or _default_output(model, options.target), options)
    if as_json:
        click.echo(json.dumps(done.record(), ensure_ascii=False))
    else:
        render(done, Console(highlight=False), dry_run=dry_run)
    if report is not None:
        _write_json(report, done)


def render(done: OptimizeReport, console: Console, *, dry_run: bool = False) -> None:
    """Print one row per pass that found something (nodes: left after it), then warnings and totals."""
    table = Table(box=None, header_style="dim", pad_edge=False, collapse_padding=True)  # fits 80 columns
    for column in ("pass", "matched", "changed", "proved", "error", "nodes", "sec"):
        table.add_column(column, justify="left" if column == "pass" else "right", no_wrap=True)
    for result in done.results:
        if not result.rewrites and not result.rejected:
            continue
        after = sum(result.ops_after.values())
        error = f"{result.max_error:.1e}" if result.proved else ""
        cells = [result.matches, result.rewrites, result.proved or "", error, after]
        table.add_row(result.name, *map(str, cells), f"{result.seconds:.2f}")
    print_whole(console, table)
    for result in done.results:
        for rejection in result.rejected[:_SHOWN_REJECTIONS]:
            console.print(Text(f"{result.name}: {rejection.node}: {rejection.reason}", style="dim"), soft_wrap=True)
        if (more := len(result.rejected) - _SHOWN_REJECTIONS) > 0:
            console.print(Text(f"{result.name}: and {more} more; --json lists them", style="dim"))
        if "mixed_precision" in result.detail:
            console.print(f"{result.name}: {result.detail['mixed_precision']['summary']}", markup=False, soft_wrap=True)
    _print_kernels(done, console)
    for warning in done.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)
    _print_totals(done, console, dry_run=dry_run)


def _print_kernels(done: OptimizeReport, console: Console) -> None:
    plain = done.ascend.get("torch_export_kernels_per_layer")
    beside = f" (torch.onnx.export: {plain})" if plain else ""
    for name, graph in done.ascend.get("graphs", {}).items():
        layer = f"{graph['kernels_per_layer']} in a layer{beside if name.startswith('decode') else ''}"
        console.print(f"{name}: {graph['kernels']} kernels by estimate, {layer}", markup=False, soft_wrap=True)


def _print_totals(done: OptimizeReport, console: Console, *, dry_run: bool) -> None:
    if done.agreement is not None:
        console.print(f"whole model: {done.agreement.summary()}", markup=False, soft_wrap=True)
    if done.loaded is not None:
        console.print(f"loaded by ONNX Runtime: {done.loaded.summary()}", markup=False, soft_wrap=True)
    nodes = f"{sum(done.ops_before.values())} → {sum(done.ops_after.values())} nodes"
    if dry_run:
        console.print(f"dry run for target {done.target}: {nodes}; nothing was written", markup=False, soft_wrap=True)
    else:
        size = f"{done.size_bytes / 1e6:.1f} MB"
        console.print(Text(f"{done.output}: target {done.target}, {nodes}, {size}"), soft_wrap=True)


def _run(model: Path, output: Path, options: OptimizeOptions) -> OptimizeReport:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None)

        def say(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        return optimize(model, output, options, say)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _passes(text: str) -> tuple[str, ...]:
    if names := _names(text):
        return names
    raise PassError(f"--passes {text!r}: names no pass; leave it out for fuse, or name some of {', '.join(GROUPS)}")


def _default_output(model: Path, target: str | None) -> Path:
    """Return a sibling: `qwen/` -> `qwen-ort/`, `qwen/model.onnx` -> `qwen/model-ort/`."""
    model = Path(os.path.abspath(model))
    return model.with_name(f"{model.stem if model.is_file() else model.name}-{target or 'optimized'}")


def _write_json(path: Path, done: OptimizeReport) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(done.record(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise click.ClickException(f"{path}: the report cannot be written: {error.strerror or error}") from error
