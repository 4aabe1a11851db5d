"""What a made problem is, and how problems are kept apart in training, validation and test.

A problem belongs to a split only when two independent hashes agree on it: the hash of its template parameters and the
hash of its normalised prompt. So the splits are disjoint by both without any list of used problems.
"""

import hashlib
import json
import random
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

SPLITS = ("train", "valid", "test")
TYPES = ("choice", "math", "generic-generate", "code-generate")
_BOUNDS = (("train", 84), ("valid", 88), ("test", 100))


@dataclass(frozen=True)
class Draft:
    """What a family writes for one set of parameters in one language.

    Attributes:
        prompt: The question alone; the evaluation templates put the instructions around it.
        steps: The thinking.
        answer: What the checker compares with; for code, the program.
        choices: For choice: the four options in letter order; the steps end with the letter of the answer.
        tests: For code: assert statements.
    """

    prompt: str
    steps: str
    answer: str
    choices: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """One kind of problem.

    Attributes:
        name: Unique; part of the parameter hash.
        type: The task type of its problems.
        draw: (rng, is_hard) -> parameters, JSON-able, that determine the problem up to wording.
        render: (parameters, is_chinese, rng) -> the problem in words; rng chooses among wordings only.
    """

    name: str
    type: str
    draw: Callable[[random.Random, bool], tuple[Any, ...]]
    render: Callable[[Any, bool, random.Random], Draft]


@dataclass(frozen=True)
class Problem:
    """A finished problem: the case as `qcompile eval` reads it, and the solution to learn from."""

    id: str
    type: str
    family: str
    language: str
    is_hard: bool
    prompt: str
    solution: str
    choices: dict[str, str] = field(default_factory=dict)
    answer: str = ""
    tests: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """The line of a case file."""
        record: dict[str, Any] = {"id": self.id, "type": self.type, "prompt": self.prompt}
        if self.choices:
            record["choices"] = self.choices
        if self.tests:
            record["tests"] = list(self.tests)
        else:
            record["answer"] = self.answer
        return {**record, "family": self.family, "language": self.language}


def split_of(text: str) -> str:
    """The split a hash falls into: 84 % train, 4 % valid, 12 % test."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100
    return next(name for name, bound in _BOUNDS if bucket < bound)


def parameter_key(family: str, parameters: tuple[Any, ...]) -> str:
    """What the parameter hash is taken of; languages and wordings share it."""
    return json.dumps([family, parameters], ensure_ascii=False, default=list)


def normalised_prompt(prompt: str, choices: dict[str, str] | None = None) -> str:
    """The prompt without case, width, spaces and punctuation; digits, letters and operators stay.

    The options of a choice problem belong to it, whatever their order.
    """
    text = " ".join([prompt, *sorted((choices or {}).values())])
    return re.sub(r"[\s,.;:!?'\"`，。；：！？、“”‘’]+", "", unicodedata.normalize("NFKC", text).casefold())


def finish(family: Family, draft: Draft, *, is_chinese: bool, is_hard: bool) -> Problem:
    """Put the letters on the options and the tags around the solution."""
    choices: dict[str, str] = {}
    answer = draft.answer
    if family.type == "choice":
        choices = dict(zip("ABCD", draft.choices, strict=True))
        answer = next(letter for letter, text in choices.items() if text == draft.answer)
    return Problem(
        id="",
        type=family.type,
        family=family.name,
        language="zh" if is_chinese else "en",
        is_hard=is_hard,
        prompt=draft.prompt,
        solution=_solution(family.type, draft, answer),
        choices=choices,
        answer=answer,
        tests=draft.tests,
    )


def shuffled(options: Iterable[str], rng: random.Random) -> tuple[str, ...]:
    """The options in random order."""
    return tuple(rng.sample(list(options), 4))


def compared(options: Iterable[str], answer: str, *, beside: bool = False) -> str:
    """The options one a line, each marked as the answer or not, up to the answer.

    The letter stands on the line: a small model finds it there, while looking an option up by several tokens is
    what it learns last. `beside` writes the answer next to each option, for long numbers.
    """
    lines = []
    for letter, option in zip("ABCD", options, strict=True):
        shown = f"{letter} {option}/{answer}" if beside else f"{letter} {option}"
        lines.append(f"{shown}{'+' if option == answer else '-'}")
        if option == answer:
            break
    return "\n".join(lines)


def _solution(case_type: str, draft: Draft, answer: str) -> str:
    steps = draft.steps
    if case_type == "choice":
        steps = f"{steps}\n{answer}"
    final = {
        "choice": f"Answer: {answer}",
        "math": f"Answer: \\boxed{{{answer}}}",
        "generic-generate": f"Answer: {answer}",
        "code-generate": f"\n```python\n{answer}\n```\n",
    }[case_type]
    return f"<think>\n{steps}\n</think>\n<answer>{final}</answer>"
