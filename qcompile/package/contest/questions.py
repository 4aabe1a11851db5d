"""The judge's list of questions, taken as it comes: whatever an entry is, it gets an answer under its own id."""

from dataclasses import dataclass
from typing import Any, Dict, List, Sequence

from qcompile.evaluate.asking import CASE_TYPES, fill, language_of
from qcompile.package.contest.settings import ContestSettings

_FALLBACK_TYPE = "generic-generate"


@dataclass(frozen=True)
class Question:
    """One entry of a test file.

    Attributes:
        place: Its place in the list.
        id: As the judge gave it.
        type: One of the four case types.
        messages: The chat that asks it.
        problem: Why it cannot be asked; empty when it can.
    """

    place: int
    id: Any
    type: str
    messages: Sequence[Dict[str, str]] = ()
    problem: str = ""


def read_questions(entries: Any, settings: ContestSettings) -> List[Question]:
    """One question for every entry, in order; an entry that is no question keeps its place with a problem."""
    if not isinstance(entries, (list, tuple)):
        entries = [entries]
    return [_guarded(place, entry, settings) for place, entry in enumerate(entries)]


def _guarded(place: int, entry: Any, settings: ContestSettings) -> Question:
    """One question; what cannot even be read costs no other question its answer."""
    try:
        return _question(place, entry, settings)
    except Exception as error:  # nobody has seen what the judge's entries may hold
        question_id = entry.get("id", "") if isinstance(entry, dict) else ""
        return Question(place, question_id, _FALLBACK_TYPE, problem=f"{type(error).__name__}: {error}")


def _question(place: int, entry: Any, settings: ContestSettings) -> Question:
    if not isinstance(entry, dict):
        return Question(place, "", _FALLBACK_TYPE, problem=f"not an object: {type(entry).__name__}")
    question_id, case_type, prompt = entry.get("id", ""), entry.get("type"), entry.get("prompt")
    if case_type not in CASE_TYPES:
        case_type = "choice" if isinstance(entry.get("choices"), dict) else _FALLBACK_TYPE
    if not isinstance(prompt, str) or not prompt.strip():
        return Question(place, question_id, case_type, problem="no prompt")
    choices = entry.get("choices") if case_type == "choice" else None
    letters = dict(sorted((str(k), str(v)) for k, v in choices.items())) if isinstance(choices, dict) else {}
    text = fill(settings.templates[case_type][language_of(prompt)], prompt, letters)
    messages = [{"role": "user", "content": text}]
    if settings.system:
        messages.insert(0, {"role": "system", "content": settings.system})
    return Question(place, question_id, case_type, messages)
