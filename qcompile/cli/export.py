"""`qcompile export`: from a checkpoint to a compiled-model directory."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from qcompile.artifact import Progress as ReportBytes
from qcompile.cli.given_path import GivenPath
from qcompile.export.export_checkpoint import DTYPES, ExportResult, export_checkpoint


@click.command("export")
@click.argument("source")
@click.option("-o", "--output", type=GivenPath(), required=True, help="Directory to write.")
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    default="fp32",
    show_default=True,
    help="Of weights, activations and KV cache.",
)
@click.option(
    "--via",
    type=click.Choice(["builder", "torch"]),
    default="builder",
    show_default=True,
    help="Build the graph from the config, or trace the transformers model.",
)
@click.option("--no-tie", is_flag=True, help="Give embedding and output head a matrix each.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a summary.")
def command(source: str, output: Path, dtype: str, via: str, no_tie: bool, as_json: bool) -> None:
    """Export SOURCE to ONNX in a compiled-model directory.

    SOURCE is a Hugging Face directory (safetensors), a .gguf file, or a hub id such as
    Qwen/Qwen2.5-0.5B-Instruct.
    """
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    started = time.perf_counter()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading" if via == "builder" else "tracing", total=None)

        def report(done: int, total: int) -> None:
            bar.update(task, description="writing", completed=done, total=total)

        result = _run(source, output, dtype, via, tie=not no_tie, report=report)
    seconds = time.perf_counter() - started
    if as_json:
        click.echo(json.dumps(_record(result, output, seconds), ensure_ascii=False))
        return
    for note in result.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    model = result.manifest.model
    console.print(
        f"{output}: {model.model_type}, {model.num_hidden_layers} layers, "
        f"{result.num_parameters / 1e6:.1f} M "
        f"parameters, {dtype}, {result.num_nodes} nodes, {result.size_bytes / 1e6:.1f} MB in {seconds:.1f} s",
        soft_wrap=True,
    )
    click.echo(str(output))


def _run(source: str, output: Path, dtype: str, via: str, *, tie: bool, report: ReportBytes) -> ExportResult:
    if via == "builder":
        return export_checkpoint(source, output, dtype=dtype, tie=tie, progress=report)
    from qcompile.export.torch_tracer import trace_checkpoint  # torch is an extra

    return trace_checkpoint(source, output, dtype=dtype, progress=report)


def _record(result: ExportResult, output: Path, seconds: float) -> dict[str, object]:
    return {
        "output": str(output),
        "seconds": round(seconds, 3),
        "num_nodes": result.num_nodes,
        "num_parameters": result.num_parameters,
        "size_bytes": result.size_bytes,
        "notes": list(result.notes),
        "manifest": dataclasses.asdict(result.manifest),
    }
