"""`qcompile atc`: compile every graph with CANN's ATC, or prepare that for a machine which has CANN."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from qcompile.ascend.atc_build import Outcome, build_oms, copy_build, find_compiler, simulate_oms, target_chip
from qcompile.ascend.atc_folder import SCRIPT_NAME, prepare_folder
from qcompile.ascend.atc_jobs import Build, check_jobs, plan_build
from qcompile.ascend.atc_options import parse_extra_flags
from qcompile.ascend.atc_run import Say
from qcompile.ascend.cann_install import CannInstall, find_cann, scan_parsers
from qcompile.ascend.chips import Cann, cann_version
from qcompile.ascend.legality.check import Parsers
from qcompile.ascend.legality.finding import Finding, Report
from qcompile.cli.given_path import GivenPath
from qcompile.errors import AtcError
from qcompile.report.numbers import human_bytes, printable

_NO_CANN = 3
_SHOWN = 5
_USUAL_CANN = "8.1"


@click.command("atc", context_settings={"ignore_unknown_options": False})
@click.argument("model", type=GivenPath())
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="[-- FLAGS OF ATC]")
@click.option(
    "--soc-version", metavar="NAME", help="Ascend910B4, ...; default: the manifest's target, or this machine's NPU."
)
@click.option(
    "--host-cpu", type=click.Choice(["aarch64", "x86_64"]), help="Where the .om will run; default: this machine's."
)
@click.option("-o", "--output", type=GivenPath(), help="Write there instead of beside the graphs.")
@click.option("--cann", metavar="VERSION", help="Release to check against; default: the installed one, else 8.1.")
@click.option("--dry-run", is_flag=True, help="Print the command lines and stop.")
@click.option(
    "--simulate", is_flag=True, help="Without CANN: files for the simulated device, which prove function, not speed."
)
@click.option("--skip-check", is_flag=True, help="Compile even what `qcompile check` would refuse.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: Path,
    flags: tuple[str, ...],
    soc_version: str | None,
    host_cpu: str | None,
    output: Path | None,
    cann: str | None,
    dry_run: bool,
    simulate: bool,
    skip_check: bool,
    as_json: bool,
) -> None:
    """Compile MODEL, an .onnx file or a lowered directory, into .om files; one per graph, resumable.

    Without CANN it prints the command lines, writes a folder to copy to a machine that has CANN, and exits with 3.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    install = None if simulate else find_cann()
    chip = target_chip(model, soc_version)
    build = plan_build(model, chip, parse_extra_flags(flags), host_cpu or "", with_keys=not dry_run)
    release = _release(console, cann, install)
    if not skip_check:
        _refuse_illegal(console, check_jobs(build, release, _installed_parsers(install)))
    if dry_run:
        _print_lines(build, as_json, {"dry_run": True})
        return
    if simulate:
        _simulate(console, build, output, release, as_json=as_json)
    elif install is None or install.atc is None:
        _prepare(console, build, output, model, as_json=as_json)
    else:
        atc, notes = find_compiler(install, os.environ)
        for note in notes:
            console.print(f"[yellow]note:[/] {escape(note)}")
        build = copy_build(build, output) if output is not None else build
        _print_outcome(
            _watched(console, lambda say: build_oms(build, atc, install, os.environ, say)), as_json, simulate
        )


def _simulate(console: Console, build: Build, output: Path | None, release: Cann, *, as_json: bool) -> None:
    placed = copy_build(build, output) if output is not None else build
    console.print(
        "[yellow]simulated:[/] these .om files run on the simulated device only (`qcompile generate DIR` does it by "
        "itself); they prove function, not speed"
    )
    outcome = _watched(console, lambda say: simulate_oms(placed, release, os.environ, say))
    _print_outcome(outcome, as_json, simulate=True)


def _prepare(console: Console, build: Build, output: Path | None, model: Path, *, as_json: bool) -> None:
    """Write the folder for a machine that has CANN, and exit with 3."""
    default = build.directory if model.is_dir() else build.directory / build.jobs[0].name
    folder = prepare_folder(build, output or default.with_name(f"{default.name}-for-atc"))
    _print_lines(build, as_json, {"folder": str(folder), "om": {}})
    console.print(
        f"no CANN here: nothing was compiled. Copy {folder} to a machine with CANN and run: bash {SCRIPT_NAME} "
        "(--simulate tries it without)",
        markup=False,
    )
    raise click.exceptions.Exit(_NO_CANN)


def _watched(console: Console, run: Callable[[Say], Outcome]) -> Outcome:
    with console.status("") as status:

        def say(name: str, event: str, seconds: float) -> None:
            if event == "running":
                status.update(f"{escape(name)}: {seconds:.0f} s")
            else:
                after = f" after {seconds:.0f} s" if event == "done" else ""
                console.print(printable(f"{name}: {event}{after}"), markup=False)

        return run(say)


def _release(console: Console, cann: str | None, install: CannInstall | None) -> Cann:
    """The release to check against: the one given, the installed one, or 8.1 with a note."""
    if cann:
        return cann_version(cann)
    try:
        return cann_version(install.version if install is not None else _USUAL_CANN)
    except AtcError:
        console.print(
            f"[yellow]note:[/] the release of CANN is not known; the rules of {_USUAL_CANN} are used (--cann says it)"
        )
        return cann_version(_USUAL_CANN)


def _installed_parsers(install: CannInstall | None) -> Parsers | None:
    """What this machine's CANN registers; None where there is nothing to scan, or the scan was cut short."""
    scan = scan_parsers(install) if install is not None else None
    return scan.operators if scan is not None and scan.operators and scan.is_complete else None


def _refuse_illegal(console: Console, reports: list[Report]) -> None:
    doubtful = [(report, finding) for report in reports for finding in report.findings if finding.stops]
    certain = [(report, finding) for report, finding in doubtful if finding.certain]
    for warning in dict.fromkeys(warning for report in reports for warning in report.warnings):
        console.print(f"[yellow]warning:[/] {escape(warning)}")
    for report, finding in doubtful[:_SHOWN]:
        console.print(printable(f"{Path(report.graph).name}: {_line(finding)}"), markup=False)
    if certain:
        report, finding = certain[0]
        raise AtcError(
            f"{report.graph}: {len(certain)} findings that ATC would refuse, first {finding.code} {finding.rule} "
            f"{finding.node or ''}: {finding.cure}; `qcompile check` lists them, --skip-check compiles anyway"
        )


def _line(finding: Finding) -> str:
    doubt = "" if finding.certain else "may be refused: "
    return f"{doubt}{finding.code} {finding.rule} {finding.node}: {finding.seen}; {finding.cure}"


def _print_lines(build: Build, as_json: bool, more: dict[str, Any]) -> None:
    if as_json:
        jobs = [
            {"name": j.name, "argv": ["atc", *j.arguments], "memory_bytes_estimate": j.memory_bytes} for j in build.jobs
        ]
        click.echo(
            json.dumps({"directory": str(build.directory), "soc_version": build.chip.name, "jobs": jobs, **more})
        )
        return
    click.echo(f"cd {build.directory}")
    for job in build.jobs:
        click.echo(job.command)


def _print_outcome(outcome: Outcome, as_json: bool, simulate: bool) -> None:
    if as_json:
        record = {"directory": str(outcome.directory), "om": outcome.oms, "manifest": outcome.has_manifest}
        click.echo(json.dumps({**record, "simulated": simulate}))
        return
    for name in outcome.oms.values():
        size = (outcome.directory / name).stat().st_size
        click.echo(f"{outcome.directory / name}: {human_bytes(size)}")
    free = shutil.disk_usage(outcome.directory).free
    if free < 1 << 30:
        click.echo(f"only {human_bytes(free)} left on this disk", err=True)
