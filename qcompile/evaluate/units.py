r"""Numbers with a unit: `5\text{ cm}`, `5 km/h`, `30元`, `\$1.50`.

A unit in one answer only is forgiven, as math-verify does; two units of one kind that differ (cm and m) are not. A
bare letter behind a number is a variable, unless it is a unit everybody writes that way.
"""

import re
from collections.abc import Callable
from fractions import Fraction

_SYNONYMS = {
    "mm": "millimeter millimeters millimetre millimetres 毫米",
    "cm": "centimeter centimeters centimetre centimetres 厘米",
    "dm": "decimeter decimeters 分米",
    "m": "meter meters metre metres 米",
    "km": "kilometer kilometers kilometre kilometres 千米 公里",
    "mg": "milligram milligrams 毫克",
    "g": "gram grams 克",
    "kg": "kilogram kilograms 千克 公斤",
    "s": "sec second seconds 秒",
    "min": "minute minutes 分钟",
    "h": "hr hour hours 小时",
    "day": "days 天",
    "ml": "milliliter milliliters 毫升",
    "l": "liter liters litre litres 升",
    "m/s": "米/秒",
    "km/h": "kmh kph 千米/时 公里/小时",
}
_KNOWN = {word: symbol for symbol, words in _SYNONYMS.items() for word in (symbol, *words.split())}
_NOT_UNITS = frozenset(["percent", "dozen", "hundred", "thousand", "million", "billion", "trillion", "times"])
_NUMERAL_WORDS = re.compile(r"[十百千万亿半几多和或与]")
_POWER = r"(?:\s*(?:\^\{?[23]\}?|[²³]))?"
_WRAPPED = rf"(?:\\[,;: ]|\s|~)*\\(?:text|mathrm|mbox|textrm)\{{\s*([^{{}}\\$%]+?)\s*\}}({_POWER})"
_BARE = rf"\s*([A-Za-z][A-Za-z/]*|[\u3400-\u9fff][\u3400-\u9fff/]*)({_POWER})"
_BEHIND = re.compile(rf"(.*?[\d}}])(?:\^\\circ)?(?:{_WRAPPED}|{_BARE})")
_BEFORE = re.compile(r"(-?)(?:\\\$|[¥￥€£])\s*([\d.,]+)")


def measure(text: str, value_of: Callable[[str], Fraction | None]) -> tuple[Fraction, str] | None:
    """Value and unit of a number with a unit; the unit is empty where it is none that can contradict another."""
    currency = _BEFORE.fullmatch(text)
    if currency is not None:
        value = value_of(currency[1] + currency[2])
        return None if value is None else (value, "")
    match = _BEHIND.fullmatch(text) if len(text) <= 200 else None
    if match is None:
        return None
    unit, power = (match[2], match[3]) if match[2] is not None else (match[4], match[5])
    value = value_of(match[1].strip())
    if value is None or not _is_unit(unit, is_wrapped=match[2] is not None, is_apart=match[1] + unit not in text):
        return None
    known = _KNOWN.get(unit.casefold(), "")
    return value, known and known + re.sub(r"[\s^{}]", "", power).replace("²", "2").replace("³", "3")


def _is_unit(unit: str, *, is_wrapped: bool, is_apart: bool) -> bool:
    word = unit.casefold()
    if word in _NOT_UNITS:
        return False
    if word in _KNOWN:
        return is_wrapped or is_apart or len(word) > 1
    if not word.isascii():
        return _NUMERAL_WORDS.search(word) is None
    return is_wrapped or (is_apart and len(word) >= 3)
