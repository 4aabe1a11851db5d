"""`qcompile fetch`: get a recipe's checkpoint into the cache."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from qcompile.cli.given_path import GivenPath
from qcompile.fetch import SOURCES, FetchProgress, fetch
from qcompile.recipe import load_recipe


@click.command("fetch")
@click.argument("recipe")
@click.option("--source", type=click.Choice(SOURCES), default="auto", show_default=True, help="Where from.")
@click.option(
    "--cache",
    type=GivenPath(file_okay=False),
    help="Cache directory; default: $QCOMPILE_CACHE or the platform's.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the path.")
def command(recipe: str, source: str, cache: Path | None, as_json: bool) -> None:
    """Download the checkpoint of RECIPE (a name such as qwen2.5-coder-0.5b-instruct, or a .toml file).

    Prints the path to give to `qcompile export`. What is downloaded is checked against the recipe's sha256,
    kept in the cache, and picked up again after an interruption.
    """
    chosen = load_recipe(recipe)
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        fetched = fetch(chosen, source=source, cache=cache, progress=_into(bar))
    if fetched.note:
        console.print(f"note: {fetched.note}", markup=False, soft_wrap=True)
    if as_json:
        record = {
            "recipe": chosen.name,
            "path": str(fetched.path),
            "source": fetched.source,
            "was_cached": fetched.was_cached,
        }
        click.echo(json.dumps(record))
        return
    origin = "already in the cache" if fetched.was_cached else f"fetched from {fetched.source}"
    console.print(f"{chosen.name}: {origin}; next: qcompile export {fetched.path} -o DIR", markup=False, soft_wrap=True)
    click.echo(str(fetched.path))


def _into(bar: Progress) -> FetchProgress:
    task = bar.add_task("", total=None)

    def report(what: str, done: int, total: int) -> None:
        bar.update(task, description=what, completed=done, total=total or None)

    return report
