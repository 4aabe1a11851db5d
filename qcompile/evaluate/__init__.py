"""The scoreboard: format gate, answer checkers, prompt templates, results and reports for the four task types."""

from qcompile.evaluate.asking import CASE_TYPES
from qcompile.evaluate.cases import Case, LineProblem, read_cases
from qcompile.evaluate.checkers import Verdict, check_answer
from qcompile.evaluate.formats import ParsedContent, extract_answer, parse_content

__all__ = [
    "CASE_TYPES",
    "Case",
    "LineProblem",
    "ParsedContent",
    "Verdict",
    "check_answer",
    "extract_answer",
    "parse_content",
    "read_cases",
]
