"""Rewards for GRPO from `qcompile.evaluate`: the official format gate and the answer checkers.

Completions of one group are often the same text, so every (problem, text) pair is judged once.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from models.reasoner.problem import Problem
from models.reasoner.prompts import case_of
from qcompile.evaluate.checkers import check_answer
from qcompile.evaluate.formats import extract_answer, parse_content
from qcompile.evaluate.sandbox import Limits

_LIMITS = Limits(wall_s=5.0, cpu_s=1)


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[0]["content"])


@lru_cache(maxsize=4096)
def problem_of(text: str) -> Problem:
    """The problem that a row of `corpus.asked` carries as JSON."""
    record = json.loads(text)
    return Problem(**{**record, "tests": tuple(record["tests"])})


def is_correct(problem: Problem, text: str) -> bool:
    """Whether the checker accepts the text; the problem's own program needs no run, its tests were made by it."""
    if problem.tests and extract_answer(problem.type, text)[0].strip() == problem.answer.strip():
        return True
    return check_answer(case_of(problem), text, _LIMITS).is_correct is True


def is_well_formed(problem: Problem, text: str) -> bool:
    """Whether the official gate matches and the per-type extraction finds an answer."""
    return parse_content(text).is_format_ok and extract_answer(problem.type, text)[1]


def format_reward(completions: list[Any], problem: list[str], **_: Any) -> list[float]:
    """1 when the text is well formed, else 0."""
    pairs = zip(completions, problem, strict=True)
    return [float(is_well_formed(problem_of(source), _text(completion))) for completion, source in pairs]


def accuracy_reward(completions: list[Any], problem: list[str], **_: Any) -> list[float]:
    """1 when the text is well formed and its answer right, else 0; code runs in the sandbox."""
    pairs = [(source, _text(completion)) for completion, source in zip(completions, problem, strict=True)]
    judged = judge({(source, text): problem_of(source) for source, text in pairs})
    return [float(judged[pair]) for pair in pairs]


def judge(asked: dict[tuple[str, str], Problem]) -> dict[tuple[str, str], bool]:
    """Verdicts on (name of a problem, text) pairs; programs run many at a time, in processes of their own."""

    def verdict(pair: tuple[str, str]) -> bool:
        return is_well_formed(asked[pair], pair[1]) and is_correct(asked[pair], pair[1])

    programs = [pair for pair in asked if asked[pair].tests]
    found = {pair: verdict(pair) for pair in asked if not asked[pair].tests}  # threads would wait for each other
    with ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as pool:
        return found | dict(zip(programs, pool.map(verdict, programs), strict=True))
