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
def _problem(text: str) -> Problem:
    record = json.loads(text)
    return Problem(**{**record, "tests": tuple(record["tests"])})


def is_correct(problem: Problem, text: str) -> bool:
    """Whether the checker accepts the text."""
    return check_answer(case_of(problem), text, _LIMITS).is_correct is True


def format_reward(completions: list[Any], problem: list[str], **_: Any) -> list[float]:
    """1 when the official gate matches and the per-type extraction finds an answer, else 0."""
    rewards = []
    for completion, source in zip(completions, problem, strict=True):
        text = _text(completion)
        found = parse_content(text).is_format_ok and extract_answer(_problem(source).type, text)[1]
        rewards.append(float(found))
    return rewards


def accuracy_reward(completions: list[Any], problem: list[str], **_: Any) -> list[float]:
    """1 when the answer is right, else 0; code runs in the sandbox."""
    pairs = [(source, _text(completion)) for completion, source in zip(completions, problem, strict=True)]
    unique = sorted(set(pairs))
    with ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as pool:
        verdicts = list(pool.map(lambda pair: is_correct(_problem(pair[0]), pair[1]), unique))
    judged = dict(zip(unique, verdicts, strict=True))
    return [float(judged[pair]) for pair in pairs]
