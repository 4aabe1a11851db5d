"""Check kernels for a chip: every operator, variant and tile, with a verdict, facts, and whether it is what was expected."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from qcompile.errors import KernelError
from qcompile.kernel_check.bisheng import Compiled, Overflow, compile_linalg
from qcompile.kernel_check.environment import KernelsEnv
from qcompile.kernel_check.lowering import Job, Lowered, lower
from qcompile.kernel_check.operators import Operator
from qcompile.kernel_check.planned_module import Facts, planned_facts
from qcompile.kernels.tile_table import KernelTable, Tile

VERDICTS = {
    "ok": "planned IR for the chip, and all buffers fit; only the closed code generator is missing",
    "overflow": "a buffer is too small",
    "frontend": "Triton refuses the source, or it and tiles.toml disagree, or it does not come to an end",
    "adapter": "Triton-Ascend cannot lower it",
    "compiler": "BiShengIR refuses it",
}


CORES = {"AIV": "vector", "AIC": "cube", "MIX": "mix"}  # of planned IR, and of tile tables


@dataclass(frozen=True)
class Case:
    """What is compiled once: a kernel at one variant and one tile, for one chip."""

    operator: Operator
    kernel: KernelTable
    variant: str
    tile: Tile
    chip: str

    @property
    def label(self) -> str:
        """One line for people: `swiglu/swiglu_kernel fp16 BLOCK=2048 Ascend910B4`."""
        return f"{self.operator.name}/{self.kernel.function} {self.variant} {self.tile.label} {self.chip}"

    def job(self) -> Job:
        """Return what the front end lowers."""
        signature = self.kernel.typed_signature(self.variant)
        return Job(self.operator.source.resolve(), self.kernel.function, signature, self.tile.constants)


@dataclass(frozen=True)
class Result:
    """A verdict with its grounds.

    Attributes:
        case: What was compiled.
        verdict: A key of VERDICTS.
        facts: Of the planned IR, when the verdict is ok.
        overflow: What did not fit, when that is the verdict.
        errors: What the refusing stage said.
        notes: What the compiler changed on its own.
        seconds: Wall time of the compiler.
        planned: The planned IR itself, for a replay.
        linalg: The adapter's linalg, for running it on a CPU.
    """

    case: Case
    verdict: str
    facts: Facts | None = None
    overflow: Overflow | None = None
    errors: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    lost_double_buffering: bool = False
    seconds: float = 0.0
    planned: str = field(default="", repr=False)
    linalg: str = field(default="", repr=False)

    @property
    def over_budget(self) -> dict[str, tuple[int, int]]:
        """Spaces that use more than the tile table states, if it states any: (used, stated or 0) in bytes."""
        used = self.facts.used_bytes if self.facts is not None else {}
        stated = self.case.tile.budget_bytes
        both = {space: (used[space], stated.get(space, 0)) for space in used if stated}
        return {space: (most, limit) for space, (most, limit) in both.items() if most > limit}

    @property
    def other_core(self) -> str:
        """The core it computes on, where that is not the tile table's; "" otherwise."""
        core = CORES.get(self.facts.cores, self.facts.cores) if self.facts is not None else self.case.kernel.core
        return core if core != self.case.kernel.core else ""

    @property
    def is_expected(self) -> bool:
        """Whether the verdict is the tile table's, within its budget and on its core."""
        return self.verdict == self.case.tile.expect and not self.over_budget and not self.other_core

    @property
    def reason(self) -> str:
        """Why the verdict is not ok, in one line."""
        if self.overflow is not None:
            return str(self.overflow)
        lines = [line.strip() for line in "\n".join(self.errors).splitlines() if line.strip()]
        if self.verdict == "frontend":
            return lines[0]  # where, and what; the source comes after it
        return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "")

    def record(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        case = self.case
        return {
            "operator": case.operator.name,
            "kernel": case.kernel.function,
            "variant": case.variant,
            "constants": dict(case.tile.constants),
            "chip": case.chip,
            "verdict": self.verdict,
            "expected": case.tile.expect,
            "is_expected": self.is_expected,
            "budget_bytes": dict(case.tile.budget_bytes),
            "over_budget": {space: list(pair) for space, pair in self.over_budget.items()},
            "overflow": vars(self.overflow) if self.overflow is not None else None,
            "lost_double_buffering": self.lost_double_buffering,
            "reason": self.reason,
            "errors": list(self.errors),
            "notes": list(self.notes),
            "seconds": round(self.seconds, 3),
            "facts": self.facts.record() if self.facts is not None else None,
        }


def cases(operators: Iterable[Operator], chips: tuple[str, ...], variants: tuple[str, ...] = ()) -> list[Case]:
    """List what there is to compile, of each table for its own chips only; empty `variants` means all."""
    return [
        Case(operator, kernel, variant, tile, chip)
        for chip in chips
        for operator in operators
        for kernel in operator.kernels
        if chip in kernel.chips
        for tile, variant in kernel.cases()
        if not variants or variant in variants
    ]


def check(
    wanted: list[Case],
    env: KernelsEnv,
    *,
    jobs: int = 2,
    time_limit_s: float = 120,
    progress: Callable[[Result], None] = lambda _: None,
) -> list[Result]:
    """Compile cases and judge them; results come in the order of the cases, progress in the order of completion.

    The front end takes a fifth of the time and runs in one child per chip; the compiler runs in `jobs` processes.

    Raises:
        KernelError: The kernels environment does not start.
    """
    results: list[Result] = []
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        for chip in dict.fromkeys(case.chip for case in wanted):
            chosen = [case for case in wanted if case.chip == chip]
            lowered = lower([case.job() for case in chosen], chip, env, time_limit_s)
            waiting = [
                pool.submit(_finish, case, text, env, time_limit_s, progress)
                for case, text in zip(chosen, lowered, strict=True)
            ]
            results += [future.result() for future in waiting]
    order = {case.label: index for index, case in enumerate(wanted)}
    return sorted(results, key=lambda result: order[result.case.label])


def _finish(
    case: Case, lowered: Lowered, env: KernelsEnv, time_limit_s: float, progress: Callable[[Result], None]
) -> Result:
    result = _judge(case, lowered, env, time_limit_s)
    progress(result)
    return result


def _judge(case: Case, lowered: Lowered, env: KernelsEnv, time_limit_s: float) -> Result:
    if lowered.stage:
        return Result(case, lowered.stage, errors=(lowered.error.strip(),))
    start = time.perf_counter()
    compiled: Compiled = compile_linalg(lowered.linalg, case.chip, env, time_limit_s)
    verdict, facts, errors = compiled.verdict, None, compiled.errors
    if verdict == "ok":
        try:
            facts = planned_facts(compiled.planned)
        except KernelError as fault:  # of this kernel; the others' results are kept
            verdict, errors = "compiler", (f"error: {fault}",)
    return Result(
        case,
        verdict,
        facts=facts,
        overflow=compiled.overflow if verdict == "overflow" else None,
        errors=errors,
        notes=compiled.notes,
        lost_double_buffering=compiled.lost_double_buffering,
        seconds=time.perf_counter() - start,
        planned=compiled.planned,
        linalg=lowered.linalg,
    )
