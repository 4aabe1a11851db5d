"""Reading a case file: one JSON object a line, every bad line reported with its number, the rest still runs."""

import ast
import json
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from qcompile.errors import EvaluateError
from qcompile.evaluate.asking import CASE_TYPES

_MAX_LINE_BYTES = 4 << 20
_LETTERS = ("A", "B", "C", "D")
_MAX_SHOWN_CHARS = 60


@dataclass(frozen=True)
class Case:
    """One question.

    Attributes:
        id: Unique within the file.
        type: One of `CASE_TYPES`.
        prompt: The question itself, without any template.
        choices: For choice: letter to text, in letter order.
        answers: Accepted answers; empty when the answer is not known.
        tests: For code-generate: Python statements run one after the other on top of the code.
        line: Line in the file, from 1; 0 when the case did not come from a file.
        extra: Every other field of the line, as it was.
    """

    id: str
    type: str
    prompt: str
    choices: dict[str, str] = field(default_factory=dict)
    answers: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    line: int = 0
    extra: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def is_checkable(self) -> bool:
        """Whether an answer can be judged right or wrong."""
        return bool(self.tests if self.type == "code-generate" else self.answers)


@dataclass(frozen=True)
class LineProblem:
    """Why one line of a case file is not a case (or only partly one)."""

    line: int
    message: str
    is_fatal: bool = True

    def __str__(self) -> str:
        return f"line {self.line}: {self.message}"


def case_from_record(record: Any, line: int = 0) -> Case:
    """Build a case from one decoded JSON value.

    Raises:
        EvaluateError: A field is missing or of the wrong kind; the message names the field.
    """
    if not isinstance(record, dict):
        raise EvaluateError(f"a case is a JSON object, not {type(record).__name__}")
    case_id = _case_id(record)
    case_type = record.get("type")
    if case_type not in CASE_TYPES:
        raise EvaluateError(f"case {shown(case_id)}: unknown type {shown(case_type)}; one of {', '.join(CASE_TYPES)}")
    prompt = record.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise EvaluateError(f"case {shown(case_id)}: 'prompt' is missing, empty or not a string")
    known = {"id", "type", "prompt", "choices", "answer", "tests"}
    case = Case(
        id=case_id,
        type=case_type,
        prompt=prompt,
        choices=_choices(record, case_id, case_type),
        answers=_strings(record.get("answer"), "answer", case_id),
        tests=_statements(record.get("tests"), case_id),
        line=line,
        extra={key: value for key, value in record.items() if key not in known},
    )
    if any(map(_has_surrogates, (case.id, case.prompt, *case.choices.values(), *case.answers, *case.tests))):
        raise EvaluateError(f"case {shown(case_id)}: the text holds half a surrogate pair, which is no character")
    return case


def doubt_about(case: Case, record: dict[str, Any]) -> str:
    """Why a case of that line runs but can hardly be judged as meant; empty when nothing is odd."""
    name = "tests" if case.type == "code-generate" else "answer"
    if any(isinstance(entry, str) and not entry.strip() for entry in _entries(record.get(name))):
        fate = "the empty ones are left out" if case.is_checkable else "not judged; fill it in or leave it out"
        return f"case {shown(case.id)}: {name!r} has empty text: {fate}"
    if case.type == "choice":
        strange = [answer for answer in case.answers if answer.strip().upper() not in case.choices]
        if strange:
            return f"case {shown(case.id)}: answer {shown(strange[0])} is none of its choices {', '.join(case.choices)}"
    if case.type == "code-generate" and case.answers and not case.tests:
        return f"case {shown(case.id)}: code is judged by 'tests', it has only an 'answer': not judged"
    for number, test in enumerate(case.tests if case.type == "code-generate" else (), 1):
        if fault := _python_fault(test):
            return f"case {shown(case.id)}: test {number} is no Python ({fault}): no program passes it"
    return ""


def _python_fault(text: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
    except SyntaxError as error:
        return error.msg
    except (ValueError, RecursionError, MemoryError) as error:  # a zero byte; brackets in brackets by the hundred
        return str(error) or type(error).__name__
    return ""


def shown(value: Any) -> str:
    """A value of a case file in a message: one line, short, and without control characters."""
    text = ascii(value) if isinstance(value, str) and _has_surrogates(value) else repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else text[: _MAX_SHOWN_CHARS - 1] + "…"


class Hash(Protocol):
    """What is fed with bytes, as hashlib's objects are."""

    def update(self, data: bytes, /) -> None:
        """Take in more."""


def read_cases(path: str | Path, digest: Hash | None = None) -> tuple[list[Case], list[LineProblem]]:
    """Read a jsonl file.

    Args:
        path: The file; it is read once, from front to back, so a pipe will do.
        digest: Is fed with every byte that is read.

    Returns:
        The cases in file order, and what is wrong with which line (`is_fatal`: the line is no case).

    Raises:
        EvaluateError: The file cannot be opened, or holds no line at all.
    """
    cases: list[Case] = []
    problems: list[LineProblem] = []
    first_line: dict[str, int] = {}
    num_lines = 0
    for number, raw in _lines(Path(path), digest):
        num_lines += 1
        try:
            record, repeated = _decode(raw)
            case = case_from_record(record, number)
        except EvaluateError as error:
            problems.append(LineProblem(number, str(error)))
            continue
        if case.id in first_line:
            problems.append(LineProblem(number, f"id {shown(case.id)} was used before, on line {first_line[case.id]}"))
            continue
        first_line[case.id] = number
        cases.append(case)
        doubts = [
            f"case {shown(case.id)}: {shown(key)} is given more than once; the last one counts" for key in repeated
        ]
        if doubt := doubt_about(case, record):
            doubts.append(doubt)
        problems += [LineProblem(number, doubt, is_fatal=False) for doubt in doubts]
    if not num_lines:
        raise EvaluateError(f"{path}: the file is empty; one JSON object a line is wanted (id, type, prompt)")
    return cases, problems


def _lines(path: Path, digest: Hash | None) -> Iterator[tuple[int, bytes]]:
    """Non-blank lines with their numbers; an over-long line is cut, which makes it a bad line, not a full memory."""
    try:
        with path.open("rb") as stream:
            number = 0
            while raw := _part(stream, digest):
                number += 1
                tail = raw
                while len(tail) > _MAX_LINE_BYTES and not tail.endswith(b"\n"):
                    tail = _part(stream, digest)
                if number == 1 and raw.startswith(b"\xef\xbb\xbf"):
                    raw = raw[3:]
                if raw.strip():
                    yield number, raw
    except OSError as error:
        raise EvaluateError(f"{path}: cannot be read: {error.strerror or error}") from None


def _part(stream: BinaryIO, digest: Hash | None) -> bytes:
    raw = stream.readline(_MAX_LINE_BYTES + 1)
    if digest is not None:
        digest.update(raw)
    return raw


def _decode(raw: bytes) -> tuple[Any, list[str]]:
    """The value of a line, and the keys that an object in it has more than once."""
    repeated: list[str] = []

    def decoded(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            repeated.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return made

    if len(raw) > _MAX_LINE_BYTES:
        raise EvaluateError(f"longer than {_MAX_LINE_BYTES} bytes")
    try:
        return json.loads(raw.rstrip(b"\r\n").decode("utf-8"), object_pairs_hook=decoded), repeated
    except UnicodeDecodeError as error:
        raise EvaluateError(f"not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}") from None
    except json.JSONDecodeError as error:
        raise EvaluateError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise EvaluateError("lists or objects lie too deep inside one another; a case needs two levels") from None
    except ValueError:  # the only other one: Python refuses to read it, as that takes quadratic time
        raise EvaluateError("a whole number has thousands of digits; write it as a string") from None


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)


def _case_id(record: dict[str, Any]) -> str:
    case_id = record.get("id")
    if isinstance(case_id, int) and not isinstance(case_id, bool):
        return str(case_id)
    if not isinstance(case_id, str) or not case_id:
        raise EvaluateError("'id' is missing, empty or neither a string nor a whole number")
    return case_id


def _choices(record: dict[str, Any], case_id: str, case_type: str) -> dict[str, str]:
    choices = record.get("choices")
    if case_type != "choice":
        return {}
    if not isinstance(choices, dict) or not choices:
        raise EvaluateError(f'case {shown(case_id)}: \'choices\' must be an object such as {{"A": "..."}}')
    strange = [letter for letter in choices if letter not in _LETTERS]
    if strange:
        raise EvaluateError(f"case {shown(case_id)}: 'choices' has {shown(strange[0])}; the letters are A, B, C, D")
    if any(isinstance(text, bool) or not isinstance(text, (str, int, float)) for text in choices.values()):
        raise EvaluateError(f"case {shown(case_id)}: the texts of 'choices' must be strings or numbers")
    return {letter: _text_of(choices[letter], "choices", case_id) for letter in _LETTERS if letter in choices}


def _strings(value: Any, name: str, case_id: str) -> tuple[str, ...]:
    """One string, one number, or a list of them; empty text tells nothing and is left out."""
    entries = _entries(value)
    if any(not isinstance(entry, (str, int, float)) or isinstance(entry, bool) for entry in entries):
        raise EvaluateError(f"case {shown(case_id)}: {name!r} must be a string, a number or a list of them")
    return tuple(text for text in (_text_of(entry, name, case_id) for entry in entries) if text.strip())


def _statements(value: Any, case_id: str) -> tuple[str, ...]:
    """Tests are text: a number would be a statement that every program passes."""
    if any(not isinstance(entry, str) for entry in _entries(value)):
        raise EvaluateError(f"case {shown(case_id)}: 'tests' must be a string or a list of strings (Python statements)")
    return _strings(value, "tests", case_id)


def _entries(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _text_of(value: str | int | float, name: str, case_id: str) -> str:
    """Text as it is, a number in plain digits: Python's own `1e-05` is not what anybody answers."""
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):  # Python's JSON lets NaN, Infinity and 1e999 pass
        raise EvaluateError(f"case {shown(case_id)}: {name!r} holds {value}, no finite number; write it as a string")
    return format(Decimal(str(value)), "f")
