"""Word problems: several quantities, two to four steps."""

import random
from typing import Any

from models.reasoner import columns
from models.reasoner.problem import Draft, Family

Rng = random.Random
_NAMES = (
    ("Tom", "小明"), ("Ann", "小红"), ("Bob", "小刚"), ("Lily", "小丽"), ("Jack", "小军"), ("Mary", "小芳"),
    ("Leo", "小华"), ("Nina", "小燕"),
)  # fmt: skip
_GOODS = (("pen", "钢笔"), ("book", "书"), ("cup", "杯子"), ("ball", "球"), ("cap", "帽子"), ("kite", "风筝"))


def draw_shopping(rng: Rng, is_hard: bool) -> tuple[Any, ...]:
    name, first, second = rng.randrange(8), *rng.sample(range(6), 2)
    if is_hard:
        n, p, m, q = rng.randint(3, 9), rng.randint(12, 99), rng.randint(3, 9), rng.randint(12, 99)
        return name, first, second, n, p, m, q, (n * p + m * q) // 100 * 100 + rng.choice((100, 200))
    n, p = rng.randint(2, 9), rng.randint(3, 40)
    return name, first, second, n, p, 0, 0, n * p // 100 * 100 + rng.choice((100, 200))


def render_shopping(parameters: Any, is_chinese: bool, rng: Rng) -> Draft:
    name, first, second, n, p, m, q, paid = parameters
    who, thing, other = (_NAMES[name][is_chinese], _GOODS[first][is_chinese], _GOODS[second][is_chinese])
    total = n * p + m * q
    lines = [columns.multiply(p, n)]
    if m:
        lines += [columns.multiply(q, m), columns.add(n * p, m * q)]
    lines.append(columns.subtract(paid, total))
    if is_chinese:
        more = f"，又买了 {m} 个{other}，每个 {q} 元" if m else ""
        text = f"{who}买了 {n} 个{thing}，每个 {p} 元{more}。付了 {paid} 元，应找回多少元？"
    else:
        more = f" and {m} {other}s at {q} yuan each" if m else ""
        text = f"{who} buys {n} {thing}s at {p} yuan each{more} and pays {paid} yuan. How much change is due?"
    return Draft(text, "\n".join(lines), str(paid - total))


def draw_travel(rng: Rng, is_hard: bool) -> tuple[Any, ...]:
    if is_hard:
        return rng.randint(41, 99), rng.randint(3, 9), rng.randint(31, 95), rng.randint(2, 9)
    return rng.randint(11, 99), rng.randint(2, 9), 0, 0


def render_travel(parameters: Any, is_chinese: bool, rng: Rng) -> Draft:
    v, t, w, s = parameters
    lines = [columns.multiply(v, t)]
    if s:
        lines += [columns.multiply(w, s), columns.add(v * t, w * s)]
    if is_chinese:
        more = f"，再以每小时 {w} 千米的速度行驶 {s} 小时" if s else ""
        text = f"一辆车以每小时 {v} 千米的速度行驶 {t} 小时{more}。一共行驶了多少千米？"
    else:
        more = f", then for {s} hours at {w} km per hour" if s else ""
        text = f"A car drives for {t} hours at {v} km per hour{more}. How many km does it drive in all?"
    return Draft(text, "\n".join(lines), str(v * t + w * s))


def draw_sharing(rng: Rng, is_hard: bool) -> tuple[Any, ...]:
    children, each = rng.randint(3, 9), rng.randint(12, 99) if is_hard else rng.randint(3, 25)
    eaten = rng.randint(11, 99) if is_hard else rng.randint(2, 20)
    return rng.randrange(8), children, each, eaten


def render_sharing(parameters: Any, is_chinese: bool, rng: Rng) -> Draft:
    name, children, each, eaten = parameters
    start = children * each + eaten
    who = _NAMES[name][is_chinese]
    lines = [columns.subtract(start, eaten), columns.divide(start - eaten, children)]
    if is_chinese:
        text = f"{who}有 {start} 颗糖，吃掉 {eaten} 颗，剩下的平均分给 {children} 个小朋友，每人分到几颗？"
    else:
        text = (
            f"{who} has {start} sweets, eats {eaten} and shares the rest equally among {children} children. "
            "How many does each child get?"
        )
    return Draft(text, "\n".join(lines), str(each))


FAMILIES = (
    Family("shopping", "math", draw_shopping, render_shopping),
    Family("travel", "math", draw_travel, render_travel),
    Family("sharing", "math", draw_sharing, render_sharing),
)
