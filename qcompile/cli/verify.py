"""`qcompile verify`: compare two models, logits and greedy tokens."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from qcompile.artifact import find_manifest
from qcompile.cli.given_path import GivenPath
from qcompile.cli.simulated_device import device_for
from qcompile.verify import NUM_TOKENS, compare_directories


@click.command("verify")
@click.argument("reference", type=GivenPath(exists=True))
@click.argument("other", type=GivenPath(exists=True))
@click.option("--tokens", default=NUM_TOKENS, show_default=True, type=click.IntRange(1, 4096), help="Per prompt.")
@click.option("--seed", default=0, show_default=True, help="Seed of the random prompts.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(reference: Path, other: Path, tokens: int, seed: int, as_json: bool) -> None:
    """Compare OTHER with REFERENCE on the same tokens; exit code 1 when they differ by more than rounding.

    A quantized model is held to the limits for quantized weights: greedy agreement and mean KL.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading", total=None)

        def say(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        with device_for(reference, None), device_for(other, None):
            agreement = compare_directories(reference, other, num_tokens=tokens, seed=seed, say=say)
    manifests = [find_manifest(path) for path in (reference, other)]
    quantized = any(m is not None and m.quantization for m in manifests)
    holds = agreement.holds(quantized=quantized)
    if as_json:
        click.echo(json.dumps({**agreement.record(), "holds": holds, "quantized": quantized}))
    else:
        click.echo(f"{'agree' if holds else 'DIFFER'}: {agreement.summary()}")
    if not holds:
        raise click.exceptions.Exit(1)
