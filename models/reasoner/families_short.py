"""Short-answer problems: strings, lists, dates, clocks, sets, order among people, kinship."""

import random
from calendar import monthrange
from datetime import date, timedelta
from typing import Any

from models.reasoner.families_choice import set_steps
from models.reasoner.families_logic import PEOPLE, draw_kinship, render_kinship_short
from models.reasoner.problem import Draft, Family

Rng = random.Random
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def draw_letters(rng: Rng, is_hard: bool) -> tuple[Any, ...]:
    size = rng.randint(8, 11) if is_hard else rng.randint(4, 7)
    kinds = ("reverse", "sort", "shift") if is_hard else ("reverse", "upper", "sort")
    return tuple(rng.choice(_LETTERS) for _ in range(size)), rng.choice(kinds)


def render_letters(parameters: Any, is_chinese: bool, rng: Rng) -> Draft:
    letters, kind = parameters
    shown = " ".join(letters)
    result = {
        "reverse": list(reversed(letters)),
        "sort": sorted(letters),
        "upper": [letter.upper() for letter in letters],
        "shift": [_LETTERS[(_LETTERS.index(letter) + 1) % 26] for letter in letters],
    }[kind]
    english = {
        "reverse": "Write the letters in reverse order",
        "sort": "Sort the letters alphabetically",
        "upper": "Write the letters as capitals",
        "shift": "Replace each letter by the next one of the alphabet (z becomes a)",
    }[kind]
    chinese = {
        "reverse": "把下列字母倒序写出",
        "sort": "把下列字母按字母表顺序排列",
        "upper": "把下列字母改成大写",
        "shift": "把每个字母换成字母表中的下一个（z 换成 a）",
    }[kind]
    lines = "".join(f"{i} {letter}" for i, letter in enumerate(letters, 1))
    if kind == "reverse":
        lines += "\n" + "".join(f"{i} {letters[i - 1]}" for i in range(len(letters), 0, -1))
    text = f"{chinese}：{shown}" if is_chinese else f"{english}: {shown}"
    return Draft(text, lines, " ".join(result))


def draw_count(rng: Rng, is_hard: bool) -> tuple[Any, ...]:
    values = tuple(rng.sample(range(1, 100), rng.randint(9, 12) if is_hard else rng.randint(4, 7)))
    return values, rng.choice(("even", "odd", "above", "below")), rng.randint(20, 80)


def render_count(parameters: Any, is_chinese: bool, rng: Rng) -> Draft:
    values, kind, bound = parameters
    marks, count = [], 0
    for x in values:
        fits = {"even": x % 2 == 0, "odd": x % 2 == 1, "above": x > bound, "below": x < bound}[kind]
        count += fits
        marks.append(f"{x}+{count}" if fits else f"{x}-")
    english = {"even": "even", "odd": "odd", "above": f"greater than {bound}", "below": f"less than {bound}"}[kind]
    chinese = {"even": "偶数", "odd": "奇数", "above": f"大于 {bound} 的数", "below": f"小于 {bound} 的数"}[kind]
    shown = f"[{', '.join(map(str, values))}]"
    text = f"How many numbers of the list {shown} are {english}?"
    if is_chinese:
        text = f"列表 {shown} 中有多少个{chinese}？"
    return Draft(text, " ".join(marks), str(count))


def draw_list(rng: Rng, is_hard: bool) -> tuple[Any, ...]:
    size = rng.randint(7, 9) if is_hard else rng.randint(4, 6)
    values = tuple(rng.sample(range(1, 100), size))
    return values, rng.choice(("up", "down", "even", "odd", "above")), rng.randint(20, 80)


def render_list(parameters: Any, is_chinese: bool, rng: Rng) -> Draft:
    values, kind, bound = parameters
    shown = f"[{', '.join(map(str, values))}]"
    if kind in ("up", "down"):
        result = sorted(values, reverse=kind == "down")
        lines = " ".join(f"{i}:{x}" for i, x in enumerate(result, 1))
    else:
        result = [x for x in values if {"even": x % 2 == 0, "odd": x % 2 == 1, "above": x > bound}[kind]]
        lines = " ".join(f"{x}{'+' if x in result else '-'}" for x in values)  # the values differ from each other
    english = {
        "up": f"Sort the list {shown} in ascending order.",
        "down": f"Sort the list {shown} in descending order.",
        "even": f"Keep only the even numbers of the list {shown}, in order.",
        "odd": f"Keep only the odd numbers of the list {shown}, in order.",
        "above": f"Keep only the numbers greater than {bound} of the list {shown}, in order.",
    }[kind]
    chinese = {
        "up": f"把列表 {shown} 从小到大排序。",
        "down": f"把列表 {shown} 从大到小排序。",
        "even": f"按原顺序保留列表 {shown} 中的偶数。",
        "odd": f"按原顺序保留列表 {shown} 中的奇数。",
        "above": f"按原顺序保留列表 {shown} 中大于 {bound} 的数。",
    }[kind]
    return Draft(chinese if is_chinese else english, lines, f"[{', '.join(map(str, result))}]")


def draw_operations(rng: Rng, is_hard: bool) -> tuple[Any, ...]:
    values = tuple(rng.sample(range(1, 30), rng.randint(4, 5) if is_hard else 3))
    kinds = ("append", "reverse", "drop first", "drop last", "sort")
    moves = tuple((rng.choice(kinds), rng.randint(1, 30)) for _ in range(rng.randint(4, 5) if is_hard else 2))
    return values, moves


def render_operations(parameters: Any, is_chinese: bool, rng: Rng) -> Draft:
    values, moves = parameters
    items, lines, told = list(values), [], []
    for kind, value in moves:
        if kind == "append":
            items = [*items, value]
        elif kind in ("drop first", "drop last") and items:
            items = items[1:] if kind == "drop first" else items[:-1]
        elif kind == "reverse":
            items = items[::-1]
        else:
            items = sorted(items)
        lines.append(f"{kind}: [{', '.join(map(str, items))}]")
        english = {"append": f"append {value}", "drop first": "remove the first element"}
        english |= {"drop last": "remove the last element", "reverse": "reverse it", "sort": "sort it ascending"}
        chinese = {"append": f"在末尾加上 {value}", "drop first": "去掉第一个元素", "drop last": "去掉最后一个元素"}
        chinese |= {"reverse": "倒序", "sort": "从小到大排序"}
        told.append((chinese if is_chinese else english)[kind])
    shown = f"[{', '.join(map(str, values))}]"
    text = f"Start with the list {shown}: {', then '.join(told)}. What is the list now?"
    if is_chinese:
        text = f"对列表 {shown} 依次进行：{'；'.join(told)}。结果是什么列表？"
    return Draft(text, "\n".join(lines), f"[{', '.join(map(str, items))}]")


def draw_date(rng: Rng, is_hard: bool) -> tuple[Any, ...]:
    start = date(2020, 1, 1) + timedelta(days=rng.randrange(3650))
    return start.isoformat(), rng.randint(35, 120) if is_hard else rng.randint(3, 30)


def render_date(parameters: Any, is_chinese: bool, rng: Rng) -> Draft:
    text, days = parameters
    start = date.fromisoformat(text)
    end = start + timedelta(days=days)
    year, month, day = start.year, start.month, start.day
    lines = [f"{day}+{days}={day + days}"]
    day += days
    while day > (length := monthrange(year, month)[1]):
        lines.append(f"{year}-{month:02d}: {length}, {day}-{length}={day - length}")
        day -= length
        year, month = (year, month + 1) if month < 12 else (year + 1, 1)
    lines.append(f"{year}-{month:02d}: {day}")
    question = f"Which date is {days} days after {text}? Answer as YYYY-MM-DD."
    if is_chinese:
        question = f"{text} 之后 {days} 天是哪一天？按 YYYY-MM-DD 回答。"
    return Draft(question, "\n".join(lines), end.isoformat())


def draw_clock(rng: Rng, is_hard: bool) -> tuple[Any, ...]:
    return rng.randrange(24), rng.randrange(60), rng.randint(150, 900) if is_hard else rng.randint(5, 150)


def render_clock(parameters: Any, is_chinese: bool, rng: Rng) -> Draft:
    hour, minute, passed = parameters
    total = minute + passed
    hours = hour + total // 60
    lines = [f"{minute}+{passed}={total}", f"{total}=60*{total // 60}+{total % 60}", f"{hour}+{total // 60}={hours}"]
    if hours >= 24:
        lines.append(f"{hours}-24={hours - 24}")
    answer = f"{hours % 24:02d}:{total % 60:02d}"
    shown = f"{hour:02d}:{minute:02d}"
    text = f"What time is it {passed} minutes after {shown}? Answer as HH:MM (24 hours)."
    if is_chinese:
        text = f"{shown} 再过 {passed} 分钟是几点几分？按 24 小时制 HH:MM 回答。"
    return Draft(text, "\n".join(lines), answer)


def draw_set_list(rng: Rng, is_hard: bool) -> tuple[Any, ...]:
    size = 7 if is_hard else 4
    left, right = (tuple(sorted(rng.sample(range(1, 40 if is_hard else 16), size))) for _ in range(2))
    return left, right, rng.choice(("union", "intersection", "difference"))


def render_set_list(parameters: Any, is_chinese: bool, rng: Rng) -> Draft:
    left, right, kind = parameters
    result, line = set_steps(left, right, kind)
    shown = (f"{{{', '.join(map(str, left))}}}", f"{{{', '.join(map(str, right))}}}")
    sign = {"union": "∪", "intersection": "∩", "difference": "\\"}[kind]
    text = f"A = {shown[0]}, B = {shown[1]}. List the elements of A {sign} B in ascending order."
    if is_chinese:
        text = f"A = {shown[0]}，B = {shown[1]}。按从小到大的顺序写出 A {sign} B 的元素。"
    return Draft(text, line, f"{{{', '.join(map(str, result))}}}")


def draw_heights(rng: Rng, is_hard: bool) -> tuple[Any, ...]:
    size = 5 if is_hard else rng.choice((3, 4))
    people = tuple(rng.sample(range(len(PEOPLE)), size))  # from tallest to shortest
    order = tuple(rng.sample(range(size - 1), size - 1))
    flips = tuple(rng.random() < 0.5 for _ in order)
    return people, order, flips, rng.choice(range(size) if is_hard else (0, size - 1))


def render_heights(parameters: Any, is_chinese: bool, rng: Rng) -> Draft:
    people, order, flips, rank = parameters
    names = [PEOPLE[person][is_chinese] for person in people]
    facts, lines = [], []
    for position, is_flipped in zip(order, flips, strict=True):
        tall, short = names[position], names[position + 1]
        lines.append(f"{tall} > {short}")
        if is_chinese:
            facts.append(f"{short}比{tall}矮。" if is_flipped else f"{tall}比{short}高。")
        else:
            facts.append(f"{short} is shorter than {tall}." if is_flipped else f"{tall} is taller than {short}.")
    lines.append(" > ".join(names))
    ordinal = ("tallest", "second tallest", "third tallest", "fourth tallest", "fifth tallest")[rank]
    if rank == len(names) - 1:
        ordinal = "shortest"
    text = f"{' '.join(facts)} Who is the {ordinal}?"
    if is_chinese:
        which = "最矮的" if rank == len(names) - 1 else ("最高的", "第二高的", "第三高的", "第四高的")[rank]
        text = f"{''.join(facts)}{which}是谁？"
    return Draft(text, "\n".join(lines), names[rank])


FAMILIES = (
    Family("letters", "generic-generate", draw_letters, render_letters),
    Family("count", "generic-generate", draw_count, render_count),
    Family("list", "generic-generate", draw_list, render_list),
    Family("operations", "generic-generate", draw_operations, render_operations),
    Family("date", "generic-generate", draw_date, render_date),
    Family("clock", "generic-generate", draw_clock, render_clock),
    Family("set-list", "generic-generate", draw_set_list, render_set_list),
    Family("heights", "generic-generate", draw_heights, render_heights),
    Family("kinship-short", "generic-generate", draw_kinship, render_kinship_short),
)
