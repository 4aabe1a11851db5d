"""Cases, answers and runs for the tests of asking and resuming."""

import json
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

from qcompile.evaluate import read_cases
from qcompile.evaluate.evaluate import Task, evaluate
from qcompile.evaluate.scoreboard import Run, scoreboard
from qcompile.evaluate.settings import EvalSettings, token_limits
from qcompile.evaluate.templates import Templates
from tests.evaluate.scripted_engine import ScriptedEngine

SETTINGS = EvalSettings(token_limits((), 1024))
CODE = "def f(x):\n    return x + {}"


def records(count: int = 4) -> list[dict[str, Any]]:
    """`count` cases of every type: number n asks for n, spelled so that answers end at different steps."""
    made: list[dict[str, Any]] = []
    for n in range(count):
        made += [
            {
                "id": f"c{n}",
                "type": "choice",
                "prompt": f"q{n}.",
                "choices": {"A": "0", "B": "1"},
                "answer": "AB"[n % 2],
            },
            {"id": f"m{n}", "type": "math", "prompt": f"q{n}.", "answer": n},
            {"id": f"g{n}", "type": "generic-generate", "prompt": f"q{n}.", "answer": str(n)},
            {"id": f"p{n}", "type": "code-generate", "prompt": f"q{n}.", "tests": [f"assert f(1) == {n + 1}"]},
        ]
    return made


def answer(prompt: str, params: Any) -> str:
    """Right for every first text; a drawn text is right when its seed is even."""
    n = int(re.search(r"q(\d+)\.", prompt)[1])  # type: ignore[index]
    padding = "think " * (n * 3 % 7)
    if "Python" in prompt:
        body = CODE.format(n if params.seed is None or params.seed % 2 == 0 else n + 1)
        return f"<think>{padding}</think><answer>\n```python\n{body}\n```\n</answer>"
    value = "AB"[n % 2] if "one correct letter" in prompt else f"\\boxed{{{n}}}" if "box" in prompt else str(n)
    return f"<think>{padding}</think><answer>Answer: {value}</answer>"


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def task_of(data: Path, settings: EvalSettings = SETTINGS, templates: Templates | None = None) -> Task:
    digest = sha256()
    cases, problems = read_cases(data, digest)
    return Task(
        data, digest.hexdigest(), cases, problems, templates or Templates.load(), settings, data.parent / "results.json"
    )


def run(engine: ScriptedEngine, task: Task, batch_size: int = 3) -> Run:
    return evaluate(engine, task, batch_size)  # type: ignore[arg-type]


def engine_in(folder: Path, **options: Any) -> ScriptedEngine:
    return ScriptedEngine(folder / "model", options.pop("answer", answer), **options)


def stable(done: Run) -> dict[str, Any]:
    """The scoreboard without what is a matter of time."""
    record = scoreboard(done)
    del record["speed"], record["settings"]["batch_size"]
    return record
