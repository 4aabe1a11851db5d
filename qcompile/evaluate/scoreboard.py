"""The scoreboard: what the texts are worth, how fast they came, and every case with its verdict."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qcompile import __version__
from qcompile.evaluate.asking import CASE_TYPES
from qcompile.evaluate.cases import Case, LineProblem, shown
from qcompile.evaluate.formats import parse_content
from qcompile.evaluate.sample import Generated, Judgement, Sample
from qcompile.evaluate.settings import EvalSettings
from qcompile.evaluate.statistics import pass_at_k, pass_at_k_with_greedy, share_of, spread_of

SCHEMA_VERSION = 1
_BROKEN_LIMIT = ("ran longer than", "printed more than", "used up its CPU time", "was ended by signal")


@dataclass(frozen=True)
class Attempt:
    """One text with its verdict."""

    sample: Sample
    judgement: Judgement

    @property
    def is_format_ok(self) -> bool:
        """Whether the official gate matches."""
        return parse_content(self.sample.text).is_format_ok


@dataclass(frozen=True)
class CaseResult:
    """A case and its texts, in the order of their numbers; `error` says why there is none or fewer."""

    case: Case
    asked: str
    attempts: tuple[Attempt, ...]
    error: str = ""

    @property
    def verdict(self) -> str:
        """Of the first text: ``right``, ``wrong``, ``unknown`` (no known answer) or ``error``."""
        if not self.attempts:
            return "error"
        return {True: "right", False: "wrong", None: "unknown"}[self.attempts[0].judgement.is_correct]


@dataclass
class Run:
    """Everything a finished run knows.

    Attributes:
        results: In file order.
        problems: Bad lines, refusals and broken limits, by line.
        generated: Tokens and seconds of everything in the journal, over all sessions.
        about: Model, data, settings and machine, for the record.
        notes: What a reader must know to judge the numbers.
    """

    results: list[CaseResult]
    problems: list[LineProblem]
    settings: EvalSettings
    generated: Generated
    about: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def attempts(self) -> list[Attempt]:
        """Every text."""
        return [attempt for result in self.results for attempt in result.attempts]


def limit_problems(results: Sequence[CaseResult]) -> list[LineProblem]:
    """Cases whose code or tests had to be stopped, by line."""
    problems = []
    for result in results:
        reasons = {attempt.judgement.reason for attempt in result.attempts}
        problems += [
            LineProblem(result.case.line, f"case {shown(result.case.id)}: the code {reason}", is_fatal=False)
            for reason in sorted(reasons)
            if reason.startswith(_BROKEN_LIMIT)
        ]
    return problems


def scoreboard(run: Run) -> dict[str, Any]:
    """The scoreboard as JSON: stable but for `speed`, `machine` and each text's seconds."""
    types = [name for name in CASE_TYPES if any(result.case.type == name for result in run.results)]
    return {
        "schema_version": SCHEMA_VERSION,
        "qcompile_version": __version__,
        **run.about,
        "score": _score(run.results, run.settings),
        "by_type": {name: _score([r for r in run.results if r.case.type == name], run.settings) for name in types},
        "speed": _speed(run),
        "notes": run.notes,
        "problems": [{"line": p.line, "message": p.message, "is_fatal": p.is_fatal} for p in run.problems],
        "cases": [_case_record(result) for result in run.results],
    }


def _score(results: Sequence[CaseResult], settings: EvalSettings) -> dict[str, Any]:
    firsts = [result.attempts[0] for result in results if result.attempts]
    attempts = [attempt for result in results for attempt in result.attempts]
    known = [result for result in results if result.case.is_checkable]
    right = sum(result.verdict == "right" for result in known)
    score = {
        "cases": len(results),
        "format": share_of(sum(attempt.is_format_ok for attempt in firsts), len(results)),
        "format_all_texts": share_of(sum(attempt.is_format_ok for attempt in attempts), len(attempts)),
        "accuracy": share_of(right, len(known)),
        "cut_off": share_of(sum(attempt.sample.is_cut_off for attempt in attempts), len(attempts)),
        "output_tokens": spread_of([attempt.sample.num_new_tokens for attempt in attempts], 2),
        "errors": sum(not result.attempts for result in results),
    }
    code = [result for result in known if result.case.type == "code-generate"]
    if code:
        score["pass_at"] = _pass_at(code, settings)
    return score


def _pass_at(results: Sequence[CaseResult], settings: EvalSettings) -> dict[str, Any]:
    """pass@k for k = 1, 3 and the number of samples, where there are that many; missing texts count as wrong."""
    ks = sorted({k for k in (1, 3, settings.samples) if k <= settings.samples})
    return {str(k): share_of(round(sum(_case_pass_at(r, settings, k) for r in results), 6), len(results)) for k in ks}


def _case_pass_at(result: CaseResult, settings: EvalSettings, k: int) -> float:
    right = [attempt.judgement.is_correct is True for attempt in result.attempts]
    right += [False] * (settings.samples - len(right))
    if settings.is_first_greedy:
        return pass_at_k_with_greedy(right[0], len(right) - 1, sum(right[1:]), k)
    return pass_at_k(len(right), sum(right), k)


def _speed(run: Run) -> dict[str, Any]:
    attempts = run.attempts
    tokens = sum(attempt.sample.num_new_tokens for attempt in attempts)
    decode = [
        (attempt.sample.num_new_tokens - 1) / (attempt.sample.duration_s - attempt.sample.ttft_s)
        for attempt in attempts
        if attempt.sample.num_new_tokens > 1 and attempt.sample.duration_s > attempt.sample.ttft_s
    ]
    counts = {
        "texts": len(attempts),
        "prompt_tokens": sum(attempt.sample.num_prompt_tokens for attempt in attempts),
        "new_tokens": tokens,
        "generated_tokens": run.generated.tokens,
    }
    if run.about.get("simulated"):
        return counts  # its seconds are not those of a device
    return {
        **counts,
        "generation_s": round(run.generated.seconds, 3),
        "tokens_per_s": round(run.generated.tokens / run.generated.seconds, 2) if run.generated.seconds > 0 else None,
        "ttft_s": spread_of([attempt.sample.ttft_s for attempt in attempts]),
        "decode_tokens_per_s_each": spread_of(decode, 2),
    }


def _case_record(result: CaseResult) -> dict[str, Any]:
    case = result.case
    record: dict[str, Any] = {"id": case.id, "type": case.type, "line": case.line, "prompt": case.prompt}
    if case.choices:
        record["choices"] = case.choices
    record |= {"answers": list(case.answers), "tests": list(case.tests), "asked": result.asked}
    record |= {"verdict": result.verdict, "error": result.error}
    record["texts"] = [
        {
            **attempt.sample.record(),
            "is_format_ok": attempt.is_format_ok,
            "is_correct": attempt.judgement.is_correct,
            "extracted": attempt.judgement.extracted,
            "reason": attempt.judgement.reason,
        }
        for attempt in result.attempts
    ]
    return record
