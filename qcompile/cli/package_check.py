"""The part of `qcompile package` that checks: run it, print the report, exit with 1 when something was found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from qcompile.package.findings import Report
from qcompile.report.numbers import printable


def check(package: Path, options: dict[str, Any], *, as_json: bool) -> None:
    """Check a package and print what was found."""
    from qcompile.package.check_contest import CheckRequest, check_contest
    from qcompile.package.check_modelarts import check_modelarts, kind_of

    request = CheckRequest(
        package,
        cases=options["cases"],
        wheels=options["wheels"],
        is_offline=options["offline"],
        limit_s=options["time_limit"] * 60,
        is_static=options["is_static"],
    )
    kind = kind_of(package)
    _refuse_cases_nobody_asks(package, kind, options)
    console = Console(stderr=True)
    with console.status("checking") as status:

        def say(text: str) -> None:
            status.update(escape(text))

        report = check_contest(request, say) if kind == "contest" else check_modelarts(request, kind, say)
    if as_json:
        click.echo(json.dumps(report.record(), ensure_ascii=False, indent=2))
    else:
        _print(report)
    if not report.is_ok:
        raise click.exceptions.Exit(1)


def _refuse_cases_nobody_asks(package: Path, kind: str, options: dict[str, Any]) -> None:
    if options["cases"] and options["is_static"]:
        raise click.UsageError("--cases is for a package that is run; --static runs nothing: leave one of them out")
    if options["cases"] and kind != "contest":
        raise click.UsageError(
            f"--cases is for a contest package; {package} is one for ModelArts, which is sent requests of its own: leave it out"
        )


def _print(report: Report) -> None:
    for step in report.passed:
        click.echo(f"ok    {step}")
    for finding in report.findings:
        click.echo(printable(f"FAIL  {finding.file}: {finding.message}"))
        if finding.judge:
            click.echo(f"      the judge: {finding.judge}")
        click.echo(printable(f"      cure: {finding.cure}"))
    for note in report.notes:
        click.echo(printable(f"note  {note}"))
    seconds = ", ".join(f"{second:.1f}" for second in report.figures.get("seconds", ()))
    if "format" in report.figures:
        score = report.figures["format"]
        click.echo(f"format {score['passed']} of {score['total']}; seconds per test file: {seconds}")
    elif seconds:
        click.echo(f"seconds per request: {seconds}")
    click.echo("every check passes" if report.is_ok else f"{len(report.findings)} found")
