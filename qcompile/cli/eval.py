"""`qcompile eval`: answer a case file with a compiled model, judge the answers, write submission and scoreboard."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from qcompile.cli.finite_range import FiniteRange
from qcompile.cli.given_path import GivenPath, refuse_to_overwrite
from qcompile.cli.output_file import OutputFile
from qcompile.cli.runtime_notes import runtime_notes
from qcompile.cli.sampling_options import template_variables
from qcompile.cli.simulated_device import device_for
from qcompile.errors import EvaluateError
from qcompile.evaluate.asking import CASE_TYPES, MAX_SUBMITTED_SAMPLES
from qcompile.evaluate.cases import LineProblem, read_cases
from qcompile.evaluate.evaluate import Task, asking_notes, evaluate, identity, select_cases
from qcompile.evaluate.journal import journal_path, other_runs, run_name
from qcompile.evaluate.sandbox import Limits
from qcompile.evaluate.scoreboard import Run, scoreboard
from qcompile.evaluate.settings import EvalSettings, token_limits
from qcompile.evaluate.submission import submission, write_json
from qcompile.evaluate.table import render
from qcompile.evaluate.templates import Templates
from qcompile.report.whole_tables import print_whole
from qcompile.runtime.host import MAX_THREADS

_DEFAULT_MAX_NEW_TOKENS = 1024


@click.command("eval")
@click.argument("directory", metavar="DIR", type=GivenPath())
@click.argument("data", metavar="DATA.jsonl", type=GivenPath())
@click.option(
    "-o",
    "--output",
    type=OutputFile(),
    help="Submission file  [default: MODEL-DATA.json here]; scoreboard and journal stand beside it.",
)
@click.option("--html", type=OutputFile(), help="Write a page with all cases to read.")
@click.option("--types", metavar="TYPE,...", default="", help=f"Only these: {', '.join(CASE_TYPES)}.")
@click.option("--limit", type=click.IntRange(1), help="At most this many cases of each type.")
@click.option(
    "--samples",
    type=click.IntRange(1, 200),
    default=MAX_SUBMITTED_SAMPLES,
    show_default=True,
    help="Texts per code case, for pass@k; the submission holds the first three.",
)
@click.option(
    "--max-new-tokens",
    multiple=True,
    metavar="N|TYPE=N",
    help=f"Tokens of an answer, for all or for one type (repeatable)  [default: {_DEFAULT_MAX_NEW_TOKENS}]",
)
@click.option(
    "--temperature",
    type=FiniteRange(0, 1e4),
    default=0.0,
    show_default=True,
    help="0: the first text of every case is greedy; above: every text is drawn.",
)
@click.option(
    "--sample-temperature",
    type=FiniteRange(0, 1e4, min_open=True),
    default=0.8,
    show_default=True,
    help="Of a code case's further texts when the first is greedy.",
)
@click.option("--top-p", type=FiniteRange(0, 1, min_open=True), default=0.95, show_default=True, help="Of draws.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of draws.")
@click.option("--templates", metavar="FILE.toml", type=GivenPath(), help="Your own prompt templates.")
@click.option("--raw", is_flag=True, help="Ask without the model's chat template.")
@click.option(
    "--template-arg",
    "template_args",
    multiple=True,
    metavar="NAME=VALUE",
    help="A variable for the chat template, VALUE as JSON or text (enable_thinking=false).",
)
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Texts computed together.")
@click.option("--threads", type=click.IntRange(1, MAX_THREADS), help="Computing threads [default: physical cores].")
@click.option("--max-model-len", type=click.IntRange(2), help="Most tokens, prompt and answer together.")
@click.option("--code-timeout", type=FiniteRange(0.1, 3600), default=8.0, show_default=True, help="Seconds per text.")
@click.option("--fresh", is_flag=True, help="Forget an earlier run with the same model and settings.")
@click.option("--json", "as_json", is_flag=True, help="Print the scoreboard, without the cases, as JSON.")
def command(
    directory: Path, data: Path, *, output: Path | None, html: Path | None, fresh: bool, as_json: bool, **options: Any
) -> None:
    """Answer the cases in DATA.jsonl with the compiled model in DIR and judge the answers.

    Every finished answer is kept in a journal beside the output: the same command again goes on where an
    interrupted one stopped.
    """
    output = output or Path(f"{directory.resolve().name}-{data.stem}.json")
    _check_paths(directory, data, output, html)
    settings = _settings(options)
    digest = sha256()
    cases, problems = read_cases(data, digest)
    task = Task(
        data,
        digest.hexdigest(),
        select_cases(cases, _types(options["types"]), options["limit"]),
        problems,
        Templates.load(options["templates"]),
        settings,
        output,
        fresh,
    )
    _report(problems)
    if not task.cases:
        raise EvaluateError(f"{data}: {'no case of the wanted types' if cases else 'not one line is a case'}")
    record = _run(directory, task, threads=options["threads"], batch_size=options["batch_size"])
    if html is not None:  # before anything is printed: who reads the table may stop, as `head` does
        from qcompile.evaluate.page import write_page

        write_page(record, html)
    if as_json:
        click.echo(json.dumps({k: v for k, v in record.items() if k != "cases"}, ensure_ascii=False, indent=2))
    else:
        print_whole(Console(highlight=False), render(record))
    _say_where(task.output, html)


def _check_paths(directory: Path, data: Path, output: Path, html: Path | None) -> None:
    """No output may stand where another one, the cases or a file of the model are."""
    for path in (output, scoreboard_path(output)):  # the default name, and one that was not given
        refuse_to_overwrite(path, directory)
    paths = [path.resolve() for path in (data, output, scoreboard_path(output), html) if path is not None]
    if len(set(paths)) < len(paths):
        raise click.UsageError("DATA.jsonl, --output, the scoreboard beside it and --html must be different files")


def _run(directory: Path, task: Task, *, threads: int | None, batch_size: int) -> dict[str, Any]:
    """Run, write submission and scoreboard, and return the scoreboard."""
    from qcompile.runtime import Engine

    record: dict[str, Any] = {}
    with (
        runtime_notes(),
        device_for(directory, threads),
        Engine(directory, threads, batch_size, task.settings.max_model_len) as engine,
    ):
        journal = _announce_journal(directory, task)
        for note in asking_notes(engine, task.settings):
            click.echo(f"note: {note}", err=True)
        try:
            with _progress() as watcher:
                evaluate(engine, task, batch_size, watcher, lambda run: record.update(_written(task, run)))
        except KeyboardInterrupt:
            click.echo(f"interrupted; what is finished is in {journal}, the same command goes on", err=True)
            raise click.exceptions.Exit(130) from None
    return record


def _written(task: Task, run: Run) -> dict[str, Any]:
    """Report what could not be asked, write submission and scoreboard; returns the scoreboard."""
    known = {(problem.line, problem.message) for problem in task.problems}
    _report([problem for problem in run.problems if (problem.line, problem.message) not in known])
    if not run.attempts:
        raise EvaluateError(f"{task.data}: not one case was answered (reasons above); {task.output} is not written")
    record = scoreboard(run)
    write_json(task.output, submission(run.results, task.settings.samples), indent=1)
    write_json(scoreboard_path(task.output), record, indent=1)
    return record


def scoreboard_path(output: Path) -> Path:
    """Where the scoreboard of a submission file stands."""
    return output.with_name(f"{run_name(output)}.scoreboard.json")


def _announce_journal(directory: Path, task: Task) -> Path:
    """Say whether the run goes on or starts anew, and why; returns the journal's path."""
    who = identity(directory, task.settings)
    path = journal_path(task.output, who)
    if path.exists() and not task.is_fresh:
        click.echo(f"note: going on with {path}", err=True)
        return path
    for other, differences in other_runs(task.output, who):
        changed = ", ".join(differences) or "model or settings"
        click.echo(f"note: {other} was made with another model or other settings ({changed}): starting anew", err=True)
    return path


def _settings(options: dict[str, Any]) -> EvalSettings:
    return EvalSettings(
        max_new_tokens=token_limits(options["max_new_tokens"], _DEFAULT_MAX_NEW_TOKENS),
        samples=options["samples"],
        temperature=options["temperature"],
        sample_temperature=options["sample_temperature"],
        top_p=options["top_p"],
        seed=options["seed"],
        is_raw=options["raw"],
        template_arguments=template_variables(options["template_args"]),
        max_model_len=options["max_model_len"],
        limits=Limits(wall_s=options["code_timeout"], cpu_s=max(1, int(options["code_timeout"] / 2))),
    )


def _types(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in CASE_TYPES:
            raise click.UsageError(f"--types {name}: no such type; there are: {', '.join(CASE_TYPES)}")
    return names


def _report(problems: list[LineProblem]) -> None:
    for problem in problems:
        click.echo(str(problem), err=True)


def _say_where(output: Path, html: Path | None) -> None:
    for path in (output, scoreboard_path(output), html):
        if path is not None:
            click.echo(f"{path}: written", err=True)


class _Bars:
    """Two progress bars on stderr: texts and verdicts."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def generating(self, finished: int, total: int, new_tokens: int) -> None:
        """See Watcher."""
        self._show("answers", finished, total, f"{new_tokens:,} tokens")

    def judging(self, finished: int, total: int) -> None:
        """See Watcher."""
        self._show("verdicts", finished, total, "")

    def _show(self, name: str, finished: int, total: int, note: str) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, note="")
        self._progress.update(self._tasks[name], completed=finished, total=total, note=note)


@contextmanager
def _progress() -> Iterator[_Bars]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield _Bars(progress)
