"""Rewards for GRPO from `qcompile.evaluate`: the official format gate and the answer checkers.

Completions of one group are often the same text, and of validation after validation too, so every (problem, text) pair is
judged once.
"""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from models.reasoner.problem import Problem
from models.reasoner.prompts import case_of
from qcompile.evaluate.checkers import check_answer
from qcompile.evaluate.formats import extract_answer, parse_content
from qcompile.evaluate.judging import judges
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
    judged = judge(pairs)
    return [float(judged[pair]) for pair in pairs]


def judge(pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], bool]:
    """Verdicts on (problem as JSON, text) pairs; programs run many at a time, in processes of their own."""
    different = sorted(set(pairs))
    programs = [pair for pair in different if problem_of(pair[0]).tests]
    with ThreadPoolExecutor(judges()) as pool:
        found = dict(zip(programs, pool.map(lambda pair: _verdict(*pair), programs), strict=True))
    # the others in turn: threads would only wait for each other
    return found | {pair: _verdict(*pair) for pair in different if pair not in found}


@lru_cache(maxsize=16384)
def _verdict(source: str, text: str) -> bool:
    problem = problem_of(source)
    return is_well_formed(problem, text) and is_correct(problem, text)
