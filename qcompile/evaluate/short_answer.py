"""Choice letters and short answers: normalisation that forgives writing, never meaning."""

import re
import unicodedata
from fractions import Fraction

from qcompile.evaluate.math_writing import HYPHENS

_QUOTES = "\"'`“”‘’「」『』"
_BRACKETS = {"[": "]", "(": ")", "{": "}"}
_NUMBER = re.compile(r"[+-]?([1-9]\d{0,2}(,\d{3})+|0|[1-9]\d{0,39})(\.\d{1,40})?")  # 007 is a code, no 7
_RAISED = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_ONE_MARK = str.maketrans({"、": ",", **dict.fromkeys(f"{HYPHENS}−", "-")})
_EXCLAMATION = re.compile(r"(?:[^\W\d_]{2}|[\u3400-\u9fff])!$")  # behind a digit or a letter alone it is a factorial


def is_same_choice(given: str, expected: str) -> bool:
    """Whether exactly the expected letter was given; several letters or none are wrong."""
    return len(given.strip()) == 1 and given.strip().upper() == expected.strip().upper()


def is_same_short_answer(given: str, expected: str) -> bool:
    """Whether two short answers say the same.

    Width, case, outer quotes, `$`, full stops and semicolons at the end, an exclamation mark behind a word, spaces
    around commas and outer brackets do not count; plain numbers without leading zeros are compared by value.
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
    text = _one_width(text).casefold().strip()
    text = re.sub(r"\s+", " ", text.translate(_ONE_MARK))
    previous = None
    while text != previous:  # each round only shortens the text
        previous = text
        text = _without_boxed(text.strip(" $*" + _QUOTES))
        is_over = text.endswith((".", "。", ";")) or _EXCLAMATION.search(text[-3:]) is not None
        text = text[:-1] if is_over else text
        if _BRACKETS.get(text[:1]) == text[-1:] and len(text) > 1 and _is_one_group(text):
            text = text[1:-1]
    return re.sub(rf"[\s{_QUOTES}]*,[\s{_QUOTES}]*", ",", text)


def as_number(text: str) -> Fraction | None:
    """The value of a plain decimal number (thousands separators allowed), else None."""
    if _NUMBER.fullmatch(text) is None:
        return None
    return Fraction(text.replace(",", ""))


def _one_width(text: str) -> str:
    """NFKC, which alone would make 52 of 5²."""
    return unicodedata.normalize("NFKC", _RAISED.sub(lambda found: "^" + found[0], text))


def _value(text: str, normal: str) -> Fraction | None:
    """The value of a short answer; a comma separates thousands only where it was written so: `[1, 234]` is a list."""
    return as_number(_one_width(text).strip(" $*." + _QUOTES) if "," in normal else normal)


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
