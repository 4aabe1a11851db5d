"""One evaluation from a case file to a scored run: read, ask, journal, judge, score."""

import platform
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qcompile.evaluate.cases import Case, LineProblem, shown
from qcompile.evaluate.journal import Journal
from qcompile.evaluate.judging import judge_all, require_checkers, verdict_key
from qcompile.evaluate.runner import Refusal, Request, Runner, make_requests
from qcompile.evaluate.scoreboard import Attempt, CaseResult, Run, limit_problems
from qcompile.evaluate.settings import EvalSettings
from qcompile.evaluate.templates import Templates
from qcompile.runtime.manifest import MANIFEST_NAME, sha256_of

if TYPE_CHECKING:
    from qcompile.runtime import Engine

_NO_TEMPLATE = "no chat template (a base model): prompts are used as they are"
_NO_VARIABLES = "the prompts do not go through a chat template: --template-arg changes nothing"


class Watcher(Protocol):
    """Is told how far a run is."""

    def generating(self, finished: int, total: int, new_tokens: int) -> None:
        """Texts finished, texts in all, tokens of this session."""

    def judging(self, finished: int, total: int) -> None:
        """Verdicts reached, texts in all."""


class Silence:
    """A watcher that says nothing."""

    def generating(self, finished: int, total: int, new_tokens: int) -> None:
        """See Watcher."""

    def judging(self, finished: int, total: int) -> None:
        """See Watcher."""


@dataclass(frozen=True)
class Task:
    """What is to be run: cases out of a file (with the lines that are none), how they are asked, and where to.

    `data_sha256` is of the file as it was read; with `is_fresh` the journal is forgotten.
    """

    data: Path
    data_sha256: str
    cases: Sequence[Case]
    problems: Sequence[LineProblem]
    templates: Templates
    settings: EvalSettings
    output: Path
    is_fresh: bool = False


def evaluate(
    engine: "Engine",
    task: Task,
    batch_size: int,
    watcher: Watcher | None = None,
    write: Callable[[Run], object] = lambda _: None,
) -> Run:
    """Generate and judge what the journal beside `task.output` does not hold yet.

    `write` is given the run while its journal is locked: no other run writes the same output then.

    Raises:
        EvaluateError: A checker is missing, or a file cannot be written.
        KeyboardInterrupt: Ctrl-C; what is finished is in the journal.
    """
    watcher = watcher or Silence()
    require_checkers(task.cases)
    requests, refusals = make_requests(engine, task.cases, task.templates, task.settings)
    with Journal(task.output, identity(engine.path, task.settings), is_fresh=task.is_fresh) as journal:
        runner = Runner(engine, journal, batch_size)
        refusals += runner.run(requests, watcher.generating)
        judge_all(requests, journal, task.settings.limits, watcher.judging)
        results = _results(task, requests, refusals, journal)
        problems = [*task.problems, *_refused(refusals), *limit_problems(results)]
        problems.sort(key=lambda problem: problem.line)
        run = Run(results, problems, task.settings, journal.generated, _about(engine, task, batch_size))
        run.notes += _notes(engine, run, journal.num_damaged)
        write(run)
    return run


def identity(model: Path, settings: EvalSettings) -> dict[str, Any]:
    """What a journal belongs to: the model's manifest (which holds the hash of every file) and the settings."""
    return {"model": sha256_of(model / MANIFEST_NAME), "settings": settings.shared()}


def select_cases(cases: Iterable[Case], types: Sequence[str], limit: int | None) -> list[Case]:
    """The cases of the wanted types (all when none is named), at most `limit` of each type, in file order."""
    seen: Counter[str] = Counter()
    chosen = []
    for case in cases:
        if types and case.type not in types:
            continue
        seen[case.type] += 1
        if limit is None or seen[case.type] <= limit:
            chosen.append(case)
    return chosen


def _results(
    task: Task, requests: Sequence[Request], refusals: Sequence[Refusal], journal: Journal
) -> list[CaseResult]:
    attempts: dict[str, list[Attempt]] = {case.id: [] for case in task.cases}
    for request in requests:
        sample = journal.samples.get(request.key)
        if sample is not None:
            judgement = journal.judgements[verdict_key(request, sample.text, task.settings.limits)]
            attempts[request.case.id].append(Attempt(sample, judgement))
    errors = {refusal.case.id: refusal.message for refusal in reversed(refusals)}
    return [
        CaseResult(case, task.templates.prompt(case), tuple(attempts[case.id]), errors.get(case.id, ""))
        for case in task.cases
    ]


def _refused(refusals: Sequence[Refusal]) -> list[LineProblem]:
    """One problem per case and reason."""
    seen = {(refusal.case.line, refusal.case.id, refusal.message) for refusal in refusals}
    return [
        LineProblem(line, f"case {shown(case_id)} was not answered: {message}")
        for line, case_id, message in sorted(seen)
    ]


def asking_notes(engine: "Engine", settings: EvalSettings) -> list[str]:
    """What is not asked as the settings may suggest."""
    notes = []
    if not engine.tokenizer.has_chat_template and not settings.is_raw:
        notes.append(_NO_TEMPLATE)
    if settings.template_arguments and (settings.is_raw or not engine.tokenizer.has_chat_template):
        notes.append(_NO_VARIABLES)
    return notes


def _notes(engine: "Engine", run: Run, num_damaged: int) -> list[str]:
    notes = asking_notes(engine, run.settings)
    if run.about["simulated"]:
        notes.append("answered by a simulated device: it proves function, not speed")
    isolations = {a.judgement.isolation for a in run.attempts} - {"", "unknown"}
    notes += [
        f"code was run without {missing}: the sandbox had only {isolation}"
        for isolation in sorted(isolations)
        if (missing := " and ".join(layer for layer in ("seccomp", "landlock", "namespaces") if layer not in isolation))
    ]
    if num_damaged:
        notes.append(f"{num_damaged} damaged lines of the journal were dropped; what they held was run again")
    return notes


def _about(engine: "Engine", task: Task, batch_size: int) -> dict[str, Any]:
    manifest = engine.manifest
    settings = {**task.settings.shared(), "samples": task.settings.samples, "limits": vars(task.settings.limits)}
    return {
        "model": {
            "path": str(engine.path),
            "manifest_sha256": sha256_of(engine.path / MANIFEST_NAME),
            "model_type": manifest.model.model_type,
            "target": manifest.target,
            "dtype": manifest.graphs[0].io.dtype,
            "quantization": manifest.quantization,
        },
        "simulated": bool(manifest.build.get("simulated")),
        "data": {"path": str(task.data), "sha256": task.data_sha256, "cases": len(task.cases)},
        "settings": {**settings, "batch_size": batch_size, "system": task.templates.system},
        "machine": {"machine": platform.machine(), "system": platform.system(), "python": platform.python_version()},
    }
