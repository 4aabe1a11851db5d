"""What each step of the optimization gains: unfused, fused, int8, batched, beside the original model run plainly.

All are measured in one run, on the same questions and with the same limits, each in a process of its own.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompile.benchmark.run import run_in_process
from qcompile.errors import PackageError
from qcompile.evaluate.asking import CASE_TYPES, STOP
from qcompile.evaluate.cases import Case
from qcompile.evaluate.templates import Templates
from qcompile.runtime.host import default_threads

_CHILD = "qcompile.package.step_child"
BASELINE = "transformers, eager"
UNFUSED = "ONNX, unfused"


@dataclass(frozen=True)
class Step:
    """One step and what it reached.

    Attributes:
        name: What it is.
        batch_size: Texts together.
        tokens_per_s: Over the whole run; None when it did not run.
        load_s: Seconds to load it.
        same_texts: How many texts are those of the first step.
        count: Texts.
        reason: Why it did not run.
    """

    name: str
    batch_size: int
    tokens_per_s: float | None
    load_s: float = 0.0
    same_texts: int = 0
    count: int = 0
    reason: str = ""

    def record(self) -> dict[str, Any]:
        """The fields for JSON."""
        return dict(vars(self))


def measure_steps(
    checkpoint: Path,
    cases: Sequence[Case],
    templates: Templates,
    *,
    max_new_tokens: int,
    batch_size: int,
    threads: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[Step]:
    """Export and optimize a checkpoint, and time every step.

    Args:
        checkpoint: A Hugging Face directory.
        cases: Few: every step answers them all.
        templates: How they are asked.
        max_new_tokens: Of every answer.
        batch_size: Of the last step.
        threads: Computing threads; None for every physical core.
        say: Told what is going on.

    Raises:
        PackageError: The checkpoint cannot be exported or optimized.
    """
    job: dict[str, Any] = {
        "conversations": [templates.messages(case) for case in cases],
        "options": {"max_new_tokens": max_new_tokens, "stop": [STOP], "include_stop": True},
        "threads": threads or default_threads(),
    }
    with tempfile.TemporaryDirectory(prefix="qcompile-steps-") as folder:
        root = Path(folder)
        say("exporting")
        _qcompile("export", str(checkpoint), "-o", str(root / "unfused"))
        for name, passes in (("fused", "fuse"), ("int8", "fuse,int8")):
            say(f"optimizing: {passes}")
            _qcompile("optimize", str(root / "unfused"), "--passes", passes, "--verify", "off", "-o", str(root / name))
        plan = (
            (BASELINE, "transformers", checkpoint, 1),
            (UNFUSED, "runtime", root / "unfused", 1),
            ("fused", "runtime", root / "fused", 1),
            ("fused, int8", "runtime", root / "int8", 1),
            (f"fused, int8, batch {batch_size}", "runtime", root / "int8", batch_size),
        )
        answers: list[tuple[str, int, dict[str, Any]]] = []
        for name, kind, path, size in plan:
            say(f"measuring: {name}")
            answers.append(
                (name, size, run_in_process(_CHILD, {**job, "kind": kind, "path": str(path), "batch_size": size}))
            )
    first: list[str] = next((answer["texts"] for _, _, answer in answers if "texts" in answer), [])
    return [_step(*one, first) for one in answers]


def choose_cases(cases: Sequence[Case], count: int) -> list[Case]:
    """The first cases of every type, `count` in all, types in turn."""
    by_type = [[case for case in cases if case.type == name] for name in CASE_TYPES]
    turns = [group[turn] for turn in range(count) for group in by_type if turn < len(group)]
    return turns[:count]


def _step(name: str, batch_size: int, answer: dict[str, Any], first: Sequence[str]) -> Step:
    if "error" in answer:
        return Step(name, batch_size, None, reason=str(answer["error"]))
    same = sum(a == b for a, b in zip(answer["texts"], first, strict=True))
    speed = answer["tokens"] / answer["seconds"]
    return Step(name, batch_size, round(speed, 2), round(answer["load_s"], 3), same, len(first))


def _qcompile(*arguments: str) -> None:
    command = [sys.executable, "-m", "qcompile.cli.main", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise PackageError(f"qcompile {arguments[0]} {arguments[1]}: {last.removeprefix('Error: ')}")
