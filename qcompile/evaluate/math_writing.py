r"""One way of writing for the many: full-width characters, `√2`, `5万`, and what stands in or around `\boxed{}`."""

import re
import unicodedata
from decimal import Decimal

_NARROW: dict[int, int | str] = {
    code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)
}  # not NFKC, which makes 52 of 5²
# Hyphen, non-breaking and small hyphen, en dash, minus sign. Not the em dash and what is as long: they part clauses, and
# for math-verify `—5` is no number either.
HYPHENS = "\u2010\u2011\ufe63"
_NARROW |= dict.fromkeys(map(ord, f"{HYPHENS}–−"), "-")
_NARROW[ord("·")] = "⋅"  # the dot that math-verify multiplies by
_EMPTY = re.compile(r"\\varnothing(?![A-Za-z])")
_ROOT = re.compile(r"√\s*(?:(\d+(?:\.\d+)?|[A-Za-z])|\{([^{}]*)\}|\(([^()]*)\))")
_LOWERED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_PART = re.compile(r"((?<![\d.])\d{1,200})?([¼-¾⅐-⅞])")  # behind a whole number it makes a mixed one
_TENS = {"十": 1, "百": 2, "千": 3, "万": 4, "亿": 8, "hundred": 2, "thousand": 3, "million": 6, "billion": 9}
_TENS |= {"trillion": 12}
CHINESE_TENS = r"(?:[十万亿]|百(?!分)|千(?![克米瓦卡赫帕焦伏字])){1,4}"
ENGLISH_TENS = r"(?:(?:hundred|thousand|million|billion|trillion)s?(?![a-z])\s*){1,3}"
_NUMERAL_WORD = re.compile(
    r"(?<![\d.,^_/十百千万亿])(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d{1,24})?|\d{1,24}(?:\.\d{1,24})?)(?:\\[,;: ]|[\s~])*"
    rf"(?P<text>\\(?:text|mathrm|textrm|mbox)\{{\s*)?(?P<words>{CHINESE_TENS}|{ENGLISH_TENS})(?P<end>\}}?)"
    r"(?!\d|[十百万亿]|千(?![克米瓦卡赫帕焦伏字]))",
    re.IGNORECASE,
)
_BOX = re.compile(r"\\boxed\s*\{")
_JOINER = re.compile(
    r"[\s$]*(?:[,;、]\s*)?(?:\\text\{)?\s*(?:or|and|或者?|和|与|及|(?<=[,;、])|(?<=[,;、]\s))\s*\}?[\s$]*"
)
_GLUED_BEFORE = re.compile(r"[-+−±]?(?:\d+(?:\.\d+)?)?(?:\\(?:cdot|times|pm|sqrt)\s*|[/^])?$")
_GLUED_BEHIND = re.compile(
    r"(?:[-+−/](?=[\d\\({]|[A-Za-z](?![A-Za-z]))|[\^_](?=[\dA-Za-z\\({])|\\(?:%|cdot|times|div|pm))[^$\n]*"
    rf"|(?:[A-Za-z\d%十百千万亿]|\\(?:pi|sqrt))[^\s$]*|(?:\\[,;: ]|\s)*\\text\{{\s*(?:{CHINESE_TENS}|{ENGLISH_TENS})\}}",
    re.IGNORECASE,
)
_DIGITS = re.compile(r"\d+(?:\.\d+)?")


def plainly_written(text: str) -> str:
    r"""The text with ASCII for full-width characters, LaTeX for `√2`, `x²` and `½`, and digits for numeral words."""
    text = _ROOT.sub(lambda found: f"\\sqrt{{{found[1] or found[2] or found[3] or ''}}}", text.translate(_NARROW))
    text = _EMPTY.sub(r"\\emptyset", text)
    text = _RAISED.sub(_lowered, text)
    text = _PART.sub(_written_out, text)
    return _NUMERAL_WORD.sub(_digits, text)


def boxed_value(text: str) -> str | None:
    r"""What the last `\\boxed{}` says, None without one.

    Boxes joined by a comma, `or` or `and` are one list, and what is glued to a box (`-\\boxed{5}`) belongs to the value.
    """
    boxes = _boxes(text)
    if not boxes:
        return None
    first = len(boxes) - 1
    while first and _JOINER.fullmatch(text[boxes[first - 1][2] : boxes[first][0]]):
        first -= 1
    values = [_with_glue(text, *box) for box in boxes[first:]]
    return values[0] if len(set(values)) == 1 else ", ".join(values)


def _lowered(found: re.Match[str]) -> str:
    power = found[0].translate(_LOWERED)
    return f"^{power}" if len(power) == 1 else f"^{{{power}}}"


def _written_out(found: re.Match[str]) -> str:
    over, under = unicodedata.normalize("NFKC", found[2]).split("\u2044")
    return f"{found[1]} {over}/{under}" if found[1] else f"\\frac{{{over}}}{{{under}}}"


def _digits(found: re.Match[str]) -> str:
    words = re.findall("[十百千万亿]|[a-z]+", found["words"].casefold())
    power = sum(_TENS[word.removesuffix("s")] for word in words)
    value = format(Decimal(found["number"].replace(",", "")).scaleb(power), "f")
    if found["text"] and not found["end"]:  # `\text{ million dollars}`: the unit stays
        return value + found["text"]
    space = " " if found["words"][-1:].isspace() else ""  # between `million` and its unit
    return value + ("" if found["text"] else found["end"]) + space


def _boxes(text: str) -> list[tuple[int, str, int]]:
    """Start, content and end of every outer box that is closed."""
    boxes: list[tuple[int, str, int]] = []
    for found in _BOX.finditer(text):
        if boxes and found.start() < boxes[-1][2]:  # a box in a box
            continue
        content = _braced(text, found.end())
        if content is not None:
            boxes.append((found.start(), content, found.end() + len(content) + 1))
    return boxes


def _braced(text: str, start: int) -> str | None:
    """The text from `start` up to the brace that closes it; None where none does."""
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return None


def _with_glue(text: str, start: int, content: str, end: int) -> str:
    found = _GLUED_BEFORE.search(text[:start])
    before = found[0] if found else ""
    found = _GLUED_BEHIND.match(text, end)
    behind = re.sub(r"(?:\\[)\]]|\*\*|[\s.。,，;])+$", "", found[0]) if found else ""
    if not before and not behind:
        return content
    if _DIGITS.fullmatch(content) and not (before[-1:].isdigit() or behind[:1].isdigit()):
        return f"{before}{content}{behind}"
    if before.endswith(("sqrt", "^")):
        return f"{before}{{{content}}}{behind}"
    times = "\\cdot" if before[-1:].isdigit() else ""
    return f"{before}{times}({content}){behind}"
