"""Choice problems: ordering, fractions, weekdays, sets, arithmetic with four options."""

import random
from fractions import Fraction
from typing import Any

from models.reasoner import columns
from models.reasoner.families_math import sum_steps
from models.reasoner.problem import Draft, Family, compared, shuffled

Rng = random.Random
_DAYS = (
    ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    ("星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日"),
)


def draw_order(rng: Rng, is_hard: bool) -> tuple[Any, ...]:
    places = rng.choice((1, 2) if not is_hard else (2, 3))
    start = rng.randint(1, 98)
    while True:
        step = 10**places
        values = tuple(
            (rng.randint(start, start + 1) * step + rng.randrange(step), places - rng.randint(0, 1)) for _ in range(4)
        )
        texts = tuple(_decimal(value, places, shown) for value, shown in values)
        if len({float(text) for text in texts}) == 4:
            rank = rng.choice((1, 2, 3, 4) if is_hard else (1, 4))
            return texts, rank


def _decimal(value: int, places: int, shown: int) -> str:
    """A decimal number with `shown` of its `places` digits after the point."""
    text = f"{value // 10**places}.{value % 10**places:0{places}d}"
    text = text[: len(text) - places + shown]
    return text[:-1] if text.endswith(".") else text


def render_order(parameters: Any, is_chinese: bool, rng: Rng) -> Draft:
    texts, rank = parameters
    texts = shuffled(texts, rng)
    english = {1: "largest", 2: "second largest", 3: "second smallest", 4: "smallest"}[rank]
    chinese = {1: "最大", 2: "第二大", 3: "第二小", 4: "最小"}[rank]
    width = max(len(text.partition(".")[2]) for text in texts)
    padded = []
    for text in texts:
        whole, _, part = text.partition(".")
        padded.append(f"{whole}.{part:0<{width}}" if width else whole)
    ranked = sorted(zip(padded, "ABCD", strict=True), key=lambda pair: float(pair[0]), reverse=True)
    lines = [
        "\n".join(f"{letter} {text}" for letter, text in zip("ABCD", padded, strict=True)),
        " > ".join(f"{text} {letter}" for text, letter in ranked),
    ]
    answer = texts["ABCD".index(ranked[rank - 1][1])]
    question = f"Which number is the {english}?"
    return Draft(f"哪个数{chinese}？" if is_chinese else question, "\n".join(lines), answer, texts)


def draw_fractions(rng: Rng, is_hard: bool) -> tuple[Any, ...]:
    top = 19 if is_hard else 9
    while True:
        pairs = []
        for _ in range(4):
            under = rng.randint(2, top)
            pairs.append((rng.randint(1, under - 1), under))
        if len({Fraction(*pair) for pair in pairs}) == 4:
            return tuple(pairs), rng.choice(("largest", "smallest"))


def render_fractions(parameters: Any, is_chinese: bool, rng: Rng) -> Draft:
    pairs, kind = parameters
    pairs = rng.sample(pairs, 4)
    best, held, lines = pairs[0], "A", []
    for letter, pair in zip("BCD", pairs[1:], strict=True):
        left, right = best[0] * pair[1], pair[0] * best[1]
        sign = "<" if left < right else ">"
        line = f"{held} {best[0]}/{best[1]} ? {letter} {pair[0]}/{pair[1]}: "
        line += f"{best[0]}*{pair[1]}={left} {sign} {pair[0]}*{best[1]}={right}"
        if (left < right) == (kind == "largest"):
            best, held = pair, letter
        lines.append(f"{line} -> {held}")
    text = f"Which fraction is the {kind}?"
    if is_chinese:
        text = f"哪个分数{'最大' if kind == 'largest' else '最小'}？"
    return Draft(text, "\n".join(lines), f"{best[0]}/{best[1]}", tuple(f"{a}/{b}" for a, b in pairs))


def draw_weekday(rng: Rng, is_hard: bool) -> tuple[Any, ...]:
    return rng.randrange(7), rng.randint(100, 999) if is_hard else rng.randint(8, 99), rng.choice(("after", "before"))


def render_weekday(parameters: Any, is_chinese: bool, rng: Rng) -> Draft:
    day, days, way = parameters
    names = _DAYS[is_chinese]
    rest = days % 7
    step = 1 if way == "after" else -1
    walk = [names[(day + step * i) % 7] for i in range(rest + 1)]
    answer = walk[-1]
    options = shuffled([answer, *rng.sample([name for name in names if name != answer], 3)], rng)
    lines = [columns.divide(days, 7), " -> ".join(walk), compared(options, answer)]
    text = f"Today is {names[day]}. What day of the week {'will it be in' if step > 0 else 'was it'} {days} days"
    text += "?" if step > 0 else " ago?"
    if is_chinese:
        text = f"今天是{names[day]}，{days} 天{'后' if step > 0 else '前'}是星期几？"
    return Draft(text, "\n".join(lines), answer, options)


def _wrong_numbers(value: int, rng: Rng) -> list[str]:
    near = {value + delta for delta in (-20, -11, -10, -9, -2, -1, 1, 2, 9, 10, 11, 20)} - {value}
    return [str(number) for number in rng.sample(sorted(number for number in near if number >= 0 or value < 0), 3)]


def draw_options(rng: Rng, is_hard: bool) -> tuple[Any, ...]:
    low, high = (100, 999) if is_hard else (20, 199)
    return tuple(rng.randint(low, high) for _ in range(3)), (rng.choice("+-"), rng.choice("+-"))


def render_options(parameters: Any, is_chinese: bool, rng: Rng) -> Draft:
    numbers, signs = parameters
    steps, total = sum_steps(numbers, signs)
    text = str(numbers[0]) + "".join(f" {s} {n}" for s, n in zip(signs, numbers[1:], strict=True))
    options = shuffled([str(total), *_wrong_numbers(total, rng)], rng)
    steps = f"{steps}\n{compared(options, str(total), beside=True)}"
    return Draft(f"{text} 等于多少？" if is_chinese else f"What is {text}?", steps, str(total), options)


def draw_sets(rng: Rng, is_hard: bool) -> tuple[Any, ...]:
    size, top = (7, 30) if is_hard else (4, 12)
    left, right = (tuple(sorted(rng.sample(range(1, top), rng.randint(size - 1, size)))) for _ in range(2))
    return left, right, rng.choice(("union", "intersection", "difference"))


def set_steps(left: tuple[int, ...], right: tuple[int, ...], kind: str) -> tuple[list[int], str]:
    """Walk through the elements, deciding each."""
    marks = [f"{x}{'+' if x in right else '-'}" for x in left]
    both = [x for x in left if x in right]
    only = [x for x in left if x not in right]
    rest = [x for x in right if x not in left]
    result = {"union": sorted([*left, *rest]), "intersection": both, "difference": only}[kind]
    line = " ".join(marks)
    if kind == "union":
        line += "; " + " ".join(f"{x}{'+' if x in left else '-'}" for x in right)
    return result, line


def render_sets(parameters: Any, is_chinese: bool, rng: Rng) -> Draft:
    left, right, kind = parameters
    result, line = set_steps(left, right, kind)
    shown = (f"{{{', '.join(map(str, left))}}}", f"{{{', '.join(map(str, right))}}}")
    size = str(len(result))
    numbered = " ".join(f"{i}:{x}" for i, x in enumerate(result, 1)) or "0"
    near = [n for n in range(max(0, len(result) - 3), len(result) + 4) if n != len(result)]
    english = {"union": "A ∪ B", "intersection": "A ∩ B", "difference": "A \\ B"}[kind]
    if is_chinese:
        text = f"A = {shown[0]}，B = {shown[1]}。{english} 有多少个元素？"
    else:
        text = f"A = {shown[0]} and B = {shown[1]}. How many elements does {english} have?"
    options = shuffled([size, *(str(n) for n in rng.sample(near, 3))], rng)
    return Draft(text, f"{line}\n{numbered}\n{compared(options, size)}", size, options)


FAMILIES = (
    Family("order", "choice", draw_order, render_order),
    Family("fractions", "choice", draw_fractions, render_fractions),
    Family("weekday", "choice", draw_weekday, render_weekday),
    Family("options", "choice", draw_options, render_options),
    Family("sets", "choice", draw_sets, render_sets),
)
