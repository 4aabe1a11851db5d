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
    "yuan": "元 人民币",
    "jiao": "角",
    "dollar": "dollars usd 美元",
    "cent": "cents 美分",
}
_KNOWN = {word: symbol for symbol, words in _SYNONYMS.items() for word in (symbol, *words.split())}
_NOT_UNITS = frozenset(["percent", "dozen", "hundred", "thousand", "million", "billion", "trillion", "times"])
_NUMERAL_WORDS = re.compile(r"[十百千万亿半几多和或与]")
_POWER = r"(?:\s*(?:\^\{?[23]\}?|[²³]))?"
_WRAPPED = rf"(?:\\[,;: ]|\s|~)*\\(?:text|mathrm|mbox|textrm)\{{\s*([^{{}}\\$%]+?)\s*\}}({_POWER})"
_BARE = rf"\s*([A-Za-z][A-Za-z/]*|[\u3400-\u9fff][\u3400-\u9fff/]*)({_POWER})"
_BEHIND = re.compile(rf"(.*?[\d}}])(?:\^\\circ)?(?:{_WRAPPED}|{_BARE})")
_BEFORE = re.compile(r"(-?)(\\\$|[¥￥€£])\s*([\d.,]+)")


def measure(text: str, value_of: Callable[[str], Fraction | None]) -> tuple[Fraction, str] | None:
    """Value and unit of a number with a unit; the unit is empty where it is none that can contradict another."""
    currency = _BEFORE.fullmatch(text)
    if currency is not None:
        value = value_of(currency[1] + currency[3])
        return None if value is None else (value, "dollar" if currency[2] == "\\$" else "")
    found = _number_and_word(text, value_of)
    if found is None:
        return None
    value, word, power, is_wrapped, is_apart = found
    return (value, _symbol(word, power)) if _is_unit(word, is_wrapped=is_wrapped, is_apart=is_apart) else None


def has_other_unit(text: str, other: str, value_of: Callable[[str], Fraction | None]) -> bool:
    """Whether both are a number and a known unit, and the units differ; `5m` counts here, variable or not."""
    found = [_number_and_word(each, value_of) for each in (text, other)]
    symbols = [_symbol(each[1], each[2]) for each in found if each is not None]
    return len(symbols) == 2 and all(symbols) and symbols[0] != symbols[1]


def _number_and_word(
    text: str, value_of: Callable[[str], Fraction | None]
) -> tuple[Fraction, str, str, bool, bool] | None:
    r"""Value, word and power behind it, whether the word is in `\\text{}`, whether a space parts the two."""
    match = _BEHIND.fullmatch(text) if len(text) <= 200 else None
    value = value_of(match[1].strip()) if match is not None else None
    if match is None or value is None:
        return None
    word, power = (match[2], match[3]) if match[2] is not None else (match[4], match[5])
    return value, word, power, match[2] is not None, match[1] + word not in text


def _symbol(word: str, power: str) -> str:
    known = _KNOWN.get(word.casefold(), "")
    return known and known + re.sub(r"[\s^{}]", "", power).replace("²", "2").replace("³", "3")


def _is_unit(unit: str, *, is_wrapped: bool, is_apart: bool) -> bool:
    word = unit.casefold()
    if word in _NOT_UNITS:
        return False
    if word in _KNOWN:
        return is_wrapped or is_apart or len(word) > 1 or not word.isascii()
    if not word.isascii():
        return _NUMERAL_WORDS.search(word) is None
    return is_wrapped or (is_apart and len(word) >= 3)
