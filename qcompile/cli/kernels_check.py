"""`qcompile kernels check`: do the kernels compile for a chip, and do their buffers fit."""

from __future__ import annotations

import json
import os
from itertools import groupby
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from qcompile.cli.finite_range import DAY_S, FiniteRange
from qcompile.cli.given_path import GivenPath
from qcompile.errors import KernelError
from qcompile.kernel_check.check import VERDICTS, Result, cases, check
from qcompile.kernel_check.environment import find_environment
from qcompile.kernel_check.operators import Operator, read_operators
from qcompile.kernels.tile_table import BUFFERS, CHIPS, FAMILY_910B
from qcompile.report.numbers import printable
from qcompile.report.whole_tables import print_whole

_NOTE = (
    "Compiled ahead of time by triton-ascend 3.2.0 and bishengir-compile 1.2.0 up to the memory plan; "
    "hivmc, which writes device code, was not called, and nothing was run on a device."
)
_REASON = 300
_COLUMNS = (
    ("types", "left"),
    ("tile", "left"),
    ("verdict", "left"),
    ("UB", "right"),
    ("L1", "right"),
    ("L0C", "right"),
    ("vector", "right"),
    ("cube", "right"),
    ("loads", "right"),
    ("stores", "right"),
    ("flags", "right"),
    ("barriers", "right"),
    ("scalar GM", "right"),
    ("UB", "right"),
    ("remarks", "left"),
)


def _chips(names: tuple[str, ...], operators: tuple[Operator, ...]) -> tuple[str, ...]:
    """Return the chips meant by --chip, spelt as the compiler spells them.

    Raises:
        KernelError: A chip that is named is none of a tile table's.
    """
    spelt = {chip.lower(): chip for chip in CHIPS}
    stated = {operator.folder: operator.kernels[0].chips for operator in operators}  # one list a file
    found: list[str] = []
    for name in names:
        if name.lower() == "all":
            found += [chip for chip in FAMILY_910B if any(chip in chips for chips in stated.values())]
        elif name.lower() in spelt:
            chip = spelt[name.lower()]
            for folder, chips in stated.items():
                if chip not in chips:
                    raise KernelError(
                        f"{folder / 'tiles.toml'}: chips = {', '.join(chips)}, not {chip}; add it, or give another --chip"
                    )
            found.append(chip)
        else:
            raise click.BadParameter(f"'{name}' is no chip the compiler knows; it knows {', '.join(CHIPS)}, or all")
    return tuple(dict.fromkeys(found))


@click.command("check")
@click.argument("operators", nargs=-1)
@click.option("--chip", "chips", multiple=True, default=("Ascend910B4",), show_default=True, metavar="CHIP|all")
@click.option("--types", "variants", multiple=True, metavar="NAME", help="Only these variants, such as fp16.")
@click.option("--kernels", "folder", type=GivenPath(), help="Another folder of operators.")
@click.option(
    "--jobs", type=click.IntRange(1, 64), default=min(8, os.cpu_count() or 1), show_default=True, help="Processes."
)
@click.option(
    "--time-limit", type=FiniteRange(1, DAY_S), default=120, show_default=True, metavar="S", help="Of one kernel."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    operators: tuple[str, ...],
    chips: tuple[str, ...],
    variants: tuple[str, ...],
    folder: Path | None,
    jobs: int,
    time_limit: float,
    as_json: bool,
) -> None:
    """Compile the kernels of OPERATORS (all, unless named) for a chip, and compare with their tile tables.

    Exit code 1 when a verdict is not the expected one or a buffer exceeds the stated budget.
    """
    there = read_operators(folder, operators)
    named = _chips(chips, there)
    known = {name for operator in there for kernel in operator.kernels for name in kernel.variants}
    for name in variants:
        if name not in known:
            raise click.BadParameter(f"'{name}' is no variant of these kernels; they have {', '.join(sorted(known))}")
    wanted = cases(there, named, variants)
    if not wanted:
        meant = " in ".join(", ".join(names) for names in (chips, variants) if names)
        raise KernelError(f"no tile of these kernels is meant for {meant}")
    environment = find_environment()
    with Progress(
        TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task("", total=len(wanted))
        results = check(wanted, environment, jobs=jobs, time_limit_s=time_limit, progress=lambda _: bar.advance(task))
    if as_json:
        record = {"expected": all(r.is_expected for r in results), "note": _NOTE}
        click.echo(json.dumps(record | {"results": [r.record() for r in results]}, indent=1))
    else:
        _show(results, named)
    if not all(result.is_expected for result in results):
        raise click.exceptions.Exit(1)


def _show(results: list[Result], chips: tuple[str, ...]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for chip in chips:
        chosen = [result for result in results if result.case.chip == chip]
        console.print(_title(chip, chosen), style="bold")
        for name, group in groupby(chosen, key=lambda r: f"{r.case.operator.name}: {r.case.kernel.function}"):
            print_whole(console, _table(name, list(group)))
    unexpected = sum(not result.is_expected for result in results)
    for verdict in dict.fromkeys(result.verdict for result in results):
        console.print(f"{verdict}: {VERDICTS[verdict]}")
    summary = f"[red]{unexpected} of {len(results)} are not what the tile tables say[/]"
    console.print(summary if unexpected else f"[green]all {len(results)} are what the tile tables say[/]")
    console.print(_NOTE, style="dim")


def _table(name: str, results: list[Result]) -> Table:
    table = Table(title=Text(name), title_justify="left", title_style="", box=None, header_style="dim")
    for column, side in _COLUMNS:
        table.add_column(column, justify="right" if side == "right" else "left", no_wrap=column != "remarks")
    for result in results:
        table.add_row(*_cells(result))
    return table


def _title(chip: str, results: list[Result]) -> str:
    known = next((result.facts.chip for result in results if result.facts is not None), None)
    if known is None:
        return chip
    cores = f"{known.get('CUBE_CORE_COUNT', 0)} cube and {known.get('VECTOR_CORE_COUNT', 0)} vector cores"
    sizes = {"UB": "UB_SIZE", "L1": "L1_SIZE", "L0C": "L0C_SIZE"}
    return f"{chip}: {cores}; " + ", ".join(f"{name} {known.get(key, 0)} bytes" for name, key in sizes.items())


def _cells(result: Result) -> list[Text]:
    case, facts = result.case, result.facts
    colour = "green" if result.is_expected else "red"
    head = [Text(case.variant), Text(case.tile.label)]
    verdict = Text(result.verdict, style=colour)
    if facts is None:
        return [*head, verdict, *(Text("") for _ in range(len(_COLUMNS) - 4)), Text(_remarks(result))]
    used = [facts.used_bytes.get(space, 0) for space in ("ub", "cbuf", "cc")]
    counts = [facts.vector_calls, facts.cube_calls, facts.gm_loads, facts.gm_stores]
    numbers = [
        *used,
        *counts,
        f"{facts.set_flags}/{facts.wait_flags}",
        facts.barriers,
        facts.scalar_gm,
        facts.scalar_ub,
    ]
    return [*head, verdict, *(Text(str(n) if n else "-") for n in numbers), Text(_remarks(result))]


def _remarks(result: Result) -> str:
    remarks = [result.reason[:_REASON]] if result.reason else []
    if result.verdict != result.case.tile.expect:
        remarks.append(f"expected {result.case.tile.expect}")
    remarks += [f"{BUFFERS[s]} {used} over the stated {stated}" for s, (used, stated) in result.over_budget.items()]
    if result.other_core:
        remarks.append(f"on {result.other_core} cores, stated {result.case.kernel.core}")
    if result.lost_double_buffering and result.facts is not None:
        remarks.append("double buffering lost")
    if result.facts is not None and result.facts.discrete:
        remarks.append(f"{result.facts.discrete} gathers element by element")
    if result.facts is not None and result.facts.workspace_bytes:
        remarks.append(f"{result.facts.workspace_bytes} bytes of workspace a block")
    return printable("; ".join(remarks))
