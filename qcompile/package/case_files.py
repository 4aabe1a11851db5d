"""The case files that a package is asked: what of them is no case is told, never left out in silence."""

from pathlib import Path

from qcompile.errors import EvaluateError
from qcompile.evaluate.cases import Case, read_cases

_MOST_NOTES = 20


def read_case_file(path: Path) -> tuple[list[Case], list[str]]:
    """Read a case file; returns its cases, and a note for every line that is none or only partly one.

    Raises:
        EvaluateError: It cannot be read, or not one line is a case.
    """
    cases, problems = read_cases(path)
    if not cases:
        raise EvaluateError(f"{path}: not one line is a case; {problems[0]}")
    left_out = "; it is left out"
    notes = [f"{path}: {problem}{left_out if problem.is_fatal else ''}" for problem in problems]
    if len(notes) > _MOST_NOTES:
        notes[_MOST_NOTES:] = [f"{path}: {len(notes) - _MOST_NOTES} more lines like these"]
    return cases, notes
