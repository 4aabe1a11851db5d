"""Small Python functions with tests: list pipelines, string pipelines, case distinctions, recurrences."""

import random
from typing import Any

from models.reasoner.problem import Draft, Family

Rng = random.Random
_NAMES = ("solve", "f", "compute", "process", "run", "work", "calc", "task")

_CONDITIONS: dict[str, tuple[str, str, str]] = {  # name -> Python, English, Chinese; {k} is a constant
    "even": ("x % 2 == 0", "even numbers", "偶数"),
    "odd": ("x % 2 == 1", "odd numbers", "奇数"),
    "divisible": ("x % {k} == 0", "numbers divisible by {k}", "能被 {k} 整除的数"),
    "above": ("x > {k}", "numbers greater than {k}", "大于 {k} 的数"),
    "below": ("x < {k}", "numbers less than {k}", "小于 {k} 的数"),
    "remainder": ("x % {k} == 1", "numbers that leave remainder 1 when divided by {k}", "除以 {k} 余 1 的数"),
}
_MAPS: dict[str, tuple[str, str, str]] = {
    "times": ("x * {k}", "multiply each by {k}", "把每个数乘以 {k}"),
    "plus": ("x + {k}", "add {k} to each", "把每个数加上 {k}"),
    "minus": ("x - {k}", "subtract {k} from each", "把每个数减去 {k}"),
    "square": ("x * x", "square each", "把每个数平方"),
    "last digit": ("x % 10", "take the last digit of each", "取每个数的个位数字"),
    "half": ("x // 2", "halve each, rounding down", "把每个数除以 2 并向下取整"),
}
_ENDS: dict[str, tuple[str, str, str]] = {
    "sum": ("sum(ys)", "return their sum", "返回它们的和"),
    "count": ("len(ys)", "return how many there are", "返回它们的个数"),
    "max": ("max(ys, default=0)", "return the largest (0 if there is none)", "返回其中最大的（没有则返回 0）"),
    "min": ("min(ys, default=0)", "return the smallest (0 if there is none)", "返回其中最小的（没有则返回 0）"),
    "list": ("ys", "return them as a list", "以列表形式返回"),
    "sorted": ("sorted(ys)", "return them as a sorted list", "以升序列表返回"),
    "reversed": ("ys[::-1]", "return them as a list in reverse order", "以倒序列表返回"),
    "distinct": ("len(set(ys))", "return how many distinct values there are", "返回不同值的个数"),
}
_TEXT: dict[str, tuple[str, str, str]] = {  # every step takes and gives a string s
    "upper": ("s.upper()", "turn it into upper case", "转成大写"),
    "lower": ("s.lower()", "turn it into lower case", "转成小写"),
    "reverse": ("s[::-1]", "reverse it", "倒序"),
    "replace": ("s.replace('{a}', '{b}')", "replace every '{a}' by '{b}'", "把每个 '{a}' 换成 '{b}'"),
    "delete": ("s.replace('{a}', '')", "delete every '{a}'", "删去每个 '{a}'"),
    "double": ("s * 2", "repeat it twice", "重复两遍"),
    "head": ("s[:{k}]", "keep the first {k} characters", "保留前 {k} 个字符"),
    "tail": ("s[{k}:]", "drop the first {k} characters", "去掉前 {k} 个字符"),
    "prefix": ("'{a}' + s", "put '{a}' in front", "在前面加上 '{a}'"),
    "sorted": ("''.join(sorted(s))", "sort its characters", "把字符排序"),
}


def _asserts(name: str, code: str, inputs: list[str]) -> tuple[str, ...]:
    """Expected values come from running the reference solution, which this module wrote itself."""
    namespace: dict[str, Any] = {}
    exec(compile(code, "<reference>", "exec"), namespace)
    return tuple(f"assert {name}({text}) == {eval(f'{name}({text})', namespace)!r}" for text in inputs)


def _constants(rng: Rng) -> dict[str, Any]:
    a, b = rng.sample("abcdeinorst", 2)
    return {"k": rng.randint(2, 9), "a": a, "b": b}


def draw_pipeline(rng: Rng, is_hard: bool) -> tuple[Any, ...]:
    conditions = tuple((rng.choice(list(_CONDITIONS)), rng.randint(2, 12)) for _ in range(2 if is_hard else 1))
    maps = tuple((rng.choice(list(_MAPS)), rng.randint(2, 9)) for _ in range(2 if is_hard else rng.randint(0, 1)))
    return rng.randrange(len(_NAMES)), conditions, maps, rng.choice(list(_ENDS))


def render_pipeline(parameters: Any, is_chinese: bool, rng: Rng) -> Draft:
    which, conditions, maps, end = parameters
    name = _NAMES[which]
    lines, steps, told = [f"def {name}(xs):", "    ys = xs"], [], []
    for kind, k in conditions:
        python, *words = (text.format(k=k) for text in _CONDITIONS[kind])
        lines.append(f"    ys = [x for x in ys if {python}]")
        told.append(f"保留其中的{words[1]}" if is_chinese else f"keep only the {words[0]}")
        steps.append(f"if {python}")
    for kind, k in maps:
        python, *words = (text.format(k=k) for text in _MAPS[kind])
        lines.append(f"    ys = [{python} for x in ys]")
        told.append(words[is_chinese])
        steps.append(python)
    lines.append(f"    return {_ENDS[end][0]}")
    steps.append(_ENDS[end][0])
    told.append(_ENDS[end][1 + is_chinese])
    code = "\n".join(lines)
    values = random.Random(code)
    inputs = [str([values.randint(0, 40) for _ in range(values.randint(4, 8))]) for _ in range(3)]
    text = f"Write a Python function {name}(xs) for a list of integers xs: {', then '.join(told)}."
    if is_chinese:
        text = f"编写 Python 函数 {name}(xs)，xs 是整数列表：{'，然后'.join(told)}。"
    return Draft(text, "\n".join(steps), code, tests=_asserts(name, code, [*inputs, "[]"]))


def draw_text(rng: Rng, is_hard: bool) -> tuple[Any, ...]:
    moves = tuple((rng.choice(list(_TEXT)), tuple(_constants(rng).items())) for _ in range(4 if is_hard else 2))
    return rng.randrange(len(_NAMES)), moves


def render_text(parameters: Any, is_chinese: bool, rng: Rng) -> Draft:
    which, moves = parameters
    name = _NAMES[which]
    lines, steps, told = [f"def {name}(s):"], [], []
    for kind, constants in moves:
        python, *words = (text.format(**dict(constants)) for text in _TEXT[kind])
        lines.append(f"    s = {python}")
        steps.append(python)
        told.append(words[is_chinese])
    code = "\n".join([*lines, "    return s"])
    values = random.Random(code)
    inputs = [repr("".join(values.choice("abcdeinorstABC ") for _ in range(values.randint(3, 9)))) for _ in range(3)]
    text = f"Write a Python function {name}(s) for a string s: {', then '.join(told)}, and return the result."
    if is_chinese:
        text = f"编写 Python 函数 {name}(s)，s 是字符串：{'，然后'.join(told)}，返回结果。"
    return Draft(text, "\n".join(steps), code, tests=_asserts(name, code, [*inputs, "''"]))


def draw_cases(rng: Rng, is_hard: bool) -> tuple[Any, ...]:
    kinds = rng.sample(list(_CONDITIONS), 3 if is_hard else 1)
    conditions = tuple((kind, rng.randint(2, 20)) for kind in kinds)
    results = tuple((rng.choice(list(_MAPS)), rng.randint(2, 9)) for _ in range(len(conditions) + 1))
    return rng.randrange(len(_NAMES)), conditions, results


def render_cases(parameters: Any, is_chinese: bool, rng: Rng) -> Draft:
    which, conditions, results = parameters
    name = _NAMES[which]
    lines, told, steps = [f"def {name}(x):"], [], []
    for (kind, k), (map_kind, m) in zip(conditions, results, strict=False):
        condition, value = _CONDITIONS[kind][0].format(k=k), _MAPS[map_kind][0].format(k=m)
        lines += [f"    if {condition}:", f"        return {value}"]
        steps.append(f"{condition}: {value}")
        told.append(f"若 {condition} 则返回 {value}" if is_chinese else f"if {condition} return {value}")
    value = _MAPS[results[-1][0]][0].format(k=results[-1][1])
    lines.append(f"    return {value}")
    steps.append(value)
    told.append(f"否则返回 {value}" if is_chinese else f"otherwise return {value}")
    code = "\n".join(lines)
    text = f"Write a Python function {name}(x) for an integer x: {'; '.join(told)}."
    if is_chinese:
        text = f"编写 Python 函数 {name}(x)，x 是整数：{'；'.join(told)}。"
    return Draft(text, "\n".join(steps), code, tests=_asserts(name, code, ["0", "1", "7", "12", "25", "30"]))


def draw_loop(rng: Rng, is_hard: bool) -> tuple[Any, ...]:
    condition = (rng.choice(list(_CONDITIONS)), rng.randint(2, 9)) if is_hard else None
    step = rng.choice(list(_MAPS)), rng.randint(2, 9)
    return rng.randrange(len(_NAMES)), rng.randint(0, 9), step, condition, rng.choice(("sum", "product", "count"))


def render_loop(parameters: Any, is_chinese: bool, rng: Rng) -> Draft:
    which, start, (map_kind, k), condition, kind = parameters
    name = _NAMES[which]
    value = _MAPS[map_kind][0].format(k=k)
    update = {"sum": f"total += {value}", "product": f"total = total * ({value}) % 1000", "count": "total += 1"}[kind]
    lines = [f"def {name}(n):", f"    total = {start}", "    for x in range(1, n + 1):"]
    english = {"sum": f"add {value}", "product": f"multiply by {value} and keep it modulo 1000", "count": "add 1"}[kind]
    chinese = {"sum": f"加上 {value}", "product": f"乘以 {value} 并对 1000 取余", "count": "加 1"}[kind]
    steps = [f"total = {start}", "x in 1..n", update]
    if condition:
        test = _CONDITIONS[condition[0]][0].format(k=condition[1])
        lines += [f"        if {test}:", f"            {update}"]
        english, chinese = f"{english} if {test}", f"若 {test} 就{chinese}"
        steps.insert(2, f"if {test}")
    else:
        lines.append(f"        {update}")
    code = "\n".join([*lines, "    return total"])
    text = f"Write a Python function {name}(n): start with {start}, for each x from 1 to n {english}, and return the total."
    if is_chinese:
        text = f"编写 Python 函数 {name}(n)：从 {start} 开始，对 1 到 n 的每个 x，{chinese}，返回总数。"
    return Draft(text, "\n".join(steps), code, tests=_asserts(name, code, ["0", "1", "5", "10", "17"]))


FAMILIES = (
    Family("pipeline", "code-generate", draw_pipeline, render_pipeline),
    Family("text", "code-generate", draw_text, render_text),
    Family("cases", "code-generate", draw_cases, render_cases),
    Family("loop", "code-generate", draw_loop, render_loop),
)
