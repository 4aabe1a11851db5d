"""`qcompile judge`: the B-board as the organisers run it, on a package or a compiled model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from qcompile.cli.finite_range import WEEK_S, FiniteRange
from qcompile.cli.given_option import is_given
from qcompile.cli.given_path import GivenPath
from qcompile.cli.output_file import OutputFile
from qcompile.errors import PackageError
from qcompile.evaluate.settings import token_limits
from qcompile.evaluate.submission import write_json
from qcompile.evaluate.templates import Templates
from qcompile.report.whole_tables import print_whole
from qcompile.runtime.errors import QCompileError
from qcompile.runtime.host import MAX_THREADS
from qcompile.runtime.manifest import MANIFEST_NAME

_DEFAULT_MAX_NEW_TOKENS = 1024
# what an option belongs to: without that it would change nothing, and whoever gave it would not know
_BELONGS = {
    "step_cases": "checkpoint",
    "wheels": "is_clean",
    **dict.fromkeys(("concurrency", "input_lengths", "output_lengths"), "has_matrix"),
}
_OF_A_COMPILED_MODEL = ("batch_size", "max_new_tokens", "templates", "threads")


def _lengths(_: click.Context, parameter: click.Parameter, text: str) -> list[int]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isascii() and word.isdigit() and 0 < int(word) <= 1 << 17 for word in words):
        raise click.BadParameter("numbers from 1 to 131072 with commas between them, such as 1,8,32", param=parameter)
    return [int(word) for word in words]


@click.command("judge")
@click.argument("package", metavar="ZIP_OR_DIR", type=GivenPath())
@click.option("--cases", multiple=True, metavar="FILE.jsonl", type=GivenPath(), help="Each a test file.")
@click.option("--matrix", "has_matrix", is_flag=True, help="Concurrencies x input lengths x output lengths.")
@click.option("--concurrency", default="1,8,32", show_default=True, callback=_lengths, help="Of the matrix.")
@click.option("--input-lengths", default="64,256", show_default=True, callback=_lengths, help="Of the matrix.")
@click.option("--output-lengths", default="32,128", show_default=True, callback=_lengths, help="Of the matrix.")
@click.option("--checkpoint", type=GivenPath(), help="The original model: measure every step from it.")
@click.option("--step-cases", type=click.IntRange(1), default=16, show_default=True, help="Questions of each step.")
@click.option("--baseline", type=FiniteRange(0), help="tokens/s for 0 points  [default: the original model's]")
@click.option("--best", type=FiniteRange(0, min_open=True), help="tokens/s for 100  [default: the best of this run]")
@click.option("--clean", "is_clean", is_flag=True, help="In a clean room, from the package's own wheels.")
@click.option("--wheels", type=GivenPath(exists=True, file_okay=False), help="clean: this machine's.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Texts computed together.")
@click.option("--max-new-tokens", multiple=True, metavar="N|TYPE=N", help="Tokens of an answer  [default: 1024]")
@click.option("--templates", metavar="FILE.toml", type=GivenPath(), help="Your own prompt templates.")
@click.option("--threads", type=click.IntRange(1, MAX_THREADS), help="Computing threads  [default: physical cores].")
@click.option(
    "--time-limit", type=FiniteRange(0, WEEK_S / 60, min_open=True), default=60.0, show_default=True, help="Minutes."
)
@click.option("-o", "--output", type=OutputFile(), help="Write everything as JSON.")
@click.option("--html", type=OutputFile(), help="Write a page with the charts.")
@click.option("--json", "as_json", is_flag=True, help="Print everything but the cases as JSON.")
def command(package: Path, *, output: Path | None, html: Path | None, as_json: bool, **options: Any) -> None:
    """Judge a contest zip, its folder, or a compiled model as the organisers do.

    --batch-size, --max-new-tokens, --templates and --threads hold for a compiled model; a zip has its own.
    """
    from qcompile.package.board import render, write_page

    if output is not None and html is not None and output.resolve() == html.resolve():
        raise click.UsageError(f"-o and --html both name {output}: the second would overwrite the first")
    _check(package, options)
    console = Console(stderr=True)
    with console.status("judging") as status:
        board = _measure(package, options, lambda text: status.update(escape(text)))
    record = board.record()
    if as_json:
        click.echo(json.dumps({k: v for k, v in record.items() if k != "cases"}, ensure_ascii=False, indent=2))
    else:
        print_whole(Console(highlight=False), render(board))
    if output is not None:
        write_json(output, record, indent=1)
    if html is not None:
        write_page(board, html)
    for path in (output, html):
        if path is not None:
            click.echo(f"{path}: written", err=True)
    if board.findings:
        raise click.exceptions.Exit(1)


def _check(package: Path, options: dict[str, Any]) -> None:
    """Refuse what would be found out, or would mean nothing, after the run."""
    if not options["cases"] and not options["has_matrix"]:
        raise click.UsageError("give --cases FILE, --matrix, or both")
    if options["checkpoint"] is not None and not options["cases"]:
        raise click.UsageError("--checkpoint measures its steps on questions: give --cases FILE too")
    flags = {str(parameter.name): parameter.opts[0] for parameter in click.get_current_context().command.params}
    for name, other in _BELONGS.items():
        if is_given(name) and not options[other]:
            raise click.UsageError(f"{flags[name]} is for {flags[other]}, and changes nothing without it")
    baseline, best = options["baseline"], options["best"]
    if baseline is not None and best is not None and best <= baseline:
        raise click.UsageError(f"--best {best:g} (100 points) must be above --baseline {baseline:g} (0 points)")
    if not package.exists():
        raise PackageError(f"{package}: there is no such file or folder")
    checkpoint = options["checkpoint"]
    if checkpoint is not None and not checkpoint.is_dir():
        raise PackageError(f"{checkpoint}: there is no such folder; --checkpoint takes a Hugging Face directory")
    if options["is_clean"] and (package / MANIFEST_NAME).is_file():
        raise PackageError(
            f"{package}: a compiled model, which has no wheels that --clean could install; `qcompile package` it first"
        )


def _notes(package: Path) -> list[str]:
    """Say that a package answers with what it was made with, whatever the command line wishes for a compiled model."""
    given = [f"--{name.replace('_', '-')}" for name in _OF_A_COMPILED_MODEL if is_given(name)]
    if not given or (package / MANIFEST_NAME).is_file():
        return []
    return [f"{', '.join(given)}: not for the answers of the package, which brings its own"]


def _measure(package: Path, options: dict[str, Any], say: Callable[[str], None]) -> Any:
    """Measure what was asked for; returns the board."""
    from qcompile.package.board import Board
    from qcompile.package.judging import judge_package, score_of

    board = Board(package.name)
    limits = token_limits(options["max_new_tokens"], _DEFAULT_MAX_NEW_TOKENS)
    if options["cases"]:
        judged = judge_package(_request(package, options, limits), say)
        board.score, board.cases = score_of(judged), judged.records
        board.notes += [*_notes(package), *judged.notes]
        board.findings += judged.findings
        if options["checkpoint"] is not None:
            board.steps = _or_found(board, lambda: _steps(judged.cases, options, max(limits.values()), say))
    if options["has_matrix"]:
        board.cells = _or_found(board, lambda: _cells(package, options, say))
    board.name_ends(options["baseline"], options["best"])
    if board.score is not None and board.baseline is None:
        board.notes.append(
            "performance is not scored: name a baseline with --baseline, or measure one with --checkpoint"
        )
    return board


def _or_found(board: Any, measure: Callable[[], list[Any]]) -> list[Any]:
    """Measure; after the answers were judged, a failure is found beside the score and does not take it away."""
    try:
        return measure()
    except QCompileError as error:
        if board.score is None:
            raise
        board.findings.append(str(error))
        return []


def _cells(package: Path, options: dict[str, Any], say: Callable[[str], None]) -> list[Any]:
    from qcompile.package.compiled_in import compiled_model
    from qcompile.package.matrix import measure_matrix

    lengths = (options["concurrency"], options["input_lengths"], options["output_lengths"])
    with compiled_model(package) as directory:
        return measure_matrix(directory, *lengths, options["threads"], say)


def _steps(cases: list[Any], options: dict[str, Any], max_new_tokens: int, say: Callable[[str], None]) -> list[Any]:
    from qcompile.package.steps import choose_cases, measure_steps

    return measure_steps(
        options["checkpoint"],
        choose_cases(cases, options["step_cases"]),
        Templates.load(options["templates"]),
        max_new_tokens=max_new_tokens,
        batch_size=options["batch_size"],
        threads=options["threads"],
        say=say,
    )


def _request(package: Path, options: dict[str, Any], limits: dict[str, int]) -> Any:
    from qcompile.package.contest_zip import ContestRequest
    from qcompile.package.judging import JudgeRequest

    settings = {"max_new_tokens": limits, "batch_size": options["batch_size"], "threads": options["threads"]}
    settings |= {"budget_s": options["time_limit"] * 60}
    contest = ContestRequest(package, package, Templates.load(options["templates"]), settings)
    return JudgeRequest(
        package,
        options["cases"],
        contest,
        is_clean=options["is_clean"],
        wheels=options["wheels"],
        limit_s=options["time_limit"] * 60,
    )
