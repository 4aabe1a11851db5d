"""Choice letters and short answers: normalisation that forgives writing, never meaning."""

import re
import unicodedata
from fractions import Fraction

_QUOTES = "\"'`“”‘’「」『』"
_BRACKETS = {"[": "]", "(": ")", "{": "}"}
_NUMBER = re.compile(r"[+-]?(\d{1,3}(,\d{3})+|\d{1,40})(\.\d{1,40})?")


def is_same_choice(given: str, expected: str) -> bool:
    """Whether exactly the expected letter was given; several letters or none are wrong."""
    return len(given.strip()) == 1 and given.strip().upper() == expected.strip().upper()


def is_same_short_answer(given: str, expected: str) -> bool:
    """Whether two short answers say the same.

    Width, case, outer quotes, `$`, one last full stop, spaces around commas and one outer bracket pair do not count;
    plain numbers are compared by value.
    """
    left, right = normalise_short_answer(given), normalise_short_answer(expected)
    if left == right:
        return bool(left) or bool(given.strip())  # `[]` and `{}` are answers, nothing at all is not
    if not left or not right:
        return False
    numbers = _value(given, left), _value(expected, right)
    return None not in numbers and numbers[0] == numbers[1]


def normalise_short_answer(text: str) -> str:
    """The form in which two short answers are compared."""
    text = unicodedata.normalize("NFKC", text).casefold().strip()
    text = re.sub(r"\s+", " ", text.replace("、", ",").replace("−", "-"))
    previous = None
    while text != previous:  # each round only shortens the text
        previous = text
        text = _without_boxed(text.strip(" $*" + _QUOTES))
        text = text[:-1] if text[-1:] in (".", "。", "!", ";") else text
        if _BRACKETS.get(text[:1]) == text[-1:] and len(text) > 1 and _is_one_group(text):
            text = text[1:-1]
    return re.sub(rf"[\s{_QUOTES}]*,[\s{_QUOTES}]*", ",", text)


def as_number(text: str) -> Fraction | None:
    """The value of a plain decimal number (thousands separators allowed), else None."""
    if _NUMBER.fullmatch(text) is None:
        return None
    return Fraction(text.replace(",", ""))


def _value(text: str, normal: str) -> Fraction | None:
    """The value of a short answer; a comma separates thousands only where it was written so: `[1, 234]` is a list."""
    return as_number(unicodedata.normalize("NFKC", text).strip(" $*." + _QUOTES) if "," in normal else normal)


def _without_boxed(text: str) -> str:
    if text.startswith("\\boxed{") and text.endswith("}") and _is_one_group(text[len("\\boxed") :]):
        return text[len("\\boxed{") : -1]
    return text


def _is_one_group(text: str) -> bool:
    """Whether the bracket that opens the text is closed by its last character and not before."""
    depth = 0
    for position, char in enumerate(text):
        depth += char in _BRACKETS
        depth -= char in _BRACKETS.values()
        if depth == 0:
            return position == len(text) - 1
    return False
