r"""Answers that math-verify takes for the same though they are of different kinds: decided before it is asked."""

import re
from collections.abc import Callable
from fractions import Fraction

from qcompile.evaluate.math_writing import CHINESE_TENS, ENGLISH_TENS

_DATE = re.compile(r"(\d{4})-(\d{1,2})-(\d{1,2})")
_IN_BASE = re.compile(r"(\d{1,200})_\{?(\d{1,9})\}?")
_DENIAL = re.compile(r"(?:\bnot\b|n't\b|不是|不等于|≠|\\neq?\b)[^A-Za-z]*$")
_NUMERAL_LEFT = re.compile(rf"[\d}}]\s*(?:\\text\{{\s*)?(?:{CHINESE_TENS}|{ENGLISH_TENS})", re.IGNORECASE)
_THOUSANDS = re.compile(r"\d,\d{3}(?!\d)")


def are_of_other_kind(left: str, right: str, value_of: Callable[[str], Fraction | None]) -> bool:
    """Whether two answers, written differently, differ in what math-verify does not look at."""
    pair = (left, right)
    if any(map(_DATE.fullmatch, pair)):
        return _numbers(_DATE, left) != _numbers(_DATE, right)
    if all(map(_IN_BASE.fullmatch, pair)):
        return _numbers(_IN_BASE, left) != _numbers(_IN_BASE, right)
    if any(map(_NUMERAL_LEFT.search, pair)):
        return True  # 3亿5千万, 1/2 million: it reads the digits only
    if bool(_DENIAL.search(left)) != bool(_DENIAL.search(right)):
        return True
    if {_outer(text) for text in pair} in ({"set", "tuple"}, {"set", "interval"}):
        return True
    lists = [_listed(text, value_of) for text in pair]
    return None not in lists and lists[0] != lists[1]


def _numbers(pattern: re.Pattern[str], text: str) -> tuple[int, ...]:
    found = pattern.fullmatch(text)
    return tuple(map(int, found.groups())) if found is not None else ()


def _outer(text: str) -> str:
    """What the outer brackets make of the text; empty without them."""
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])\s*", "", text)
    if text.startswith("\\{") and text.endswith("\\}"):
        return "set"
    if text.startswith("(") and text.endswith(")"):
        return "tuple"
    return "interval" if text[:1] in ("[", "(") and text[-1:] in ("]", ")") else ""


def _listed(text: str, value_of: Callable[[str], Fraction | None]) -> list[Fraction] | None:
    """Two or more numbers between commas, by size; None where a comma may part thousands."""
    if "," not in text or _THOUSANDS.search(text):
        return None
    values = [value_of(entry) for entry in text.split(",")]
    known = [value for value in values if value is not None]
    return sorted(known) if len(known) == len(values) else None
