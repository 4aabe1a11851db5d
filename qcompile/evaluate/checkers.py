"""Is an answer right? One checker per task type, on the text the official extraction gives."""

from collections.abc import Callable
from dataclasses import dataclass

from qcompile.evaluate.cases import Case
from qcompile.evaluate.formats import extract_answer
from qcompile.evaluate.math_answer import is_same_math
from qcompile.evaluate.sandbox import Limits, run_code
from qcompile.evaluate.short_answer import is_same_choice, is_same_short_answer


@dataclass(frozen=True)
class Verdict:
    """What a checker says of one text.

    Attributes:
        is_correct: None when the case has no known answer.
        extracted: The text that was compared.
        reason: Why it is wrong, or how the code failed; empty when right.
        isolation: For code that was run: the layers of the sandbox.
    """

    is_correct: bool | None
    extracted: str
    reason: str = ""
    isolation: str = ""


_COMPARE: dict[str, Callable[[str, str], bool]] = {
    "choice": is_same_choice,
    "math": is_same_math,
    "generic-generate": is_same_short_answer,
}


def check_answer(case: Case, content: str, limits: Limits | None = None) -> Verdict:
    """Judge one text of a model.

    Raises:
        EvaluateError: The checker itself cannot run (math-verify is missing).
    """
    extracted, _ = extract_answer(case.type, content)
    if not case.is_checkable:
        return Verdict(None, extracted, "no known answer")
    if case.type == "code-generate":
        outcome = run_code(extracted, case.tests, limits or Limits())
        return Verdict(outcome.is_passed, extracted, "" if outcome.is_passed else outcome.reason, outcome.isolation)
    compare = _COMPARE[case.type]
    if any(compare(extracted, expected) for expected in case.answers):
        return Verdict(True, extracted)
    return Verdict(False, extracted, f"expected {' or '.join(case.answers)}")
