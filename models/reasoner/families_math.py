"""Math problems: arithmetic, fractions, percentages, equations, word problems, number bases, divisors."""

import random
from math import gcd
from typing import Any

from models.reasoner import columns
from models.reasoner.problem import Draft, Family

Rng = random.Random


def _number(rng: Rng, digits: int) -> int:
    return rng.randint(10 ** (digits - 1) + (digits == 1), 10**digits - 1)


def _ask(expression: str, is_chinese: bool, rng: Rng) -> str:
    english = ("What is {}?", "Compute {}.", "Calculate {}.", "Find the value of {}.")
    chinese = ("计算 {}。", "{} 等于多少？", "求 {} 的值。")
    return rng.choice(chinese if is_chinese else english).format(expression)


def draw_sum(rng: Rng, is_hard: bool) -> tuple[Any, ...]:
    terms = rng.randint(3, 4) if is_hard else rng.randint(2, 3)
    numbers = [_number(rng, rng.randint(3, 4) if is_hard else rng.randint(2, 3)) for _ in range(terms)]
    return tuple(numbers), tuple(rng.choice("+-") for _ in numbers[1:])


def sum_steps(numbers: tuple[int, ...], signs: tuple[str, ...]) -> tuple[str, int]:
    """The running total, one operation a line."""
    total, lines = numbers[0], []
    for sign, number in zip(signs, numbers[1:], strict=True):
        result = total + number if sign == "+" else total - number
        if total < 0:  # -a+b = b-a, -a-b = -(a+b)
            step = columns.subtract(number, -total) if sign == "+" else columns.add(-total, number)
            lines.append(f"{step}\n{total}{sign}{number}={result}")
        else:
            lines.append(columns.add(total, number) if sign == "+" else columns.subtract(total, number))
        total = result
    return "\n".join(lines), total


def render_sum(parameters: Any, is_chinese: bool, rng: Rng) -> Draft:
    numbers, signs = parameters
    text = str(numbers[0]) + "".join(f" {s} {n}" for s, n in zip(signs, numbers[1:], strict=True))
    steps, total = sum_steps(numbers, signs)
    return Draft(_ask(text, is_chinese, rng), steps, str(total))


def draw_product(rng: Rng, is_hard: bool) -> tuple[Any, ...]:
    if is_hard:
        return _number(rng, rng.choice((2, 3))), _number(rng, 2)
    return _number(rng, rng.choice((2, 3))), rng.randint(2, 9)


def render_product(parameters: Any, is_chinese: bool, rng: Rng) -> Draft:
    a, b = parameters
    return Draft(_ask(f"{a} × {b}", is_chinese, rng), columns.multiply(a, b), str(a * b))


def draw_precedence(rng: Rng, is_hard: bool) -> tuple[Any, ...]:
    if is_hard:
        return "brackets", *(rng.randint(11, 60) for _ in range(2)), rng.randint(3, 9), rng.randint(100, 999)
    return "plain", rng.randint(10, 99), rng.randint(11, 40), rng.randint(2, 9), rng.choice("+-")


def render_precedence(parameters: Any, is_chinese: bool, rng: Rng) -> Draft:
    if parameters[0] == "brackets":
        _, a, b, c, d = parameters
        product = (a + b) * c
        text = f"({a} + {b}) × {c} - {d}"
        steps = [columns.add(a, b), columns.multiply(a + b, c), columns.subtract(product, d)]
        return Draft(_ask(text, is_chinese, rng), "\n".join(steps), str(product - d))
    _, a, b, c, sign = parameters
    last = columns.add(a, b * c) if sign == "+" else columns.subtract(a, b * c)
    result = a + b * c if sign == "+" else a - b * c
    steps = [columns.multiply(b, c), last]
    return Draft(_ask(f"{a} {sign} {b} × {c}", is_chinese, rng), "\n".join(steps), str(result))


def draw_fraction(rng: Rng, is_hard: bool) -> tuple[Any, ...]:
    top = 20 if is_hard else 9
    b, d = rng.randint(2, top), rng.randint(2, top)
    return rng.randint(1, b - 1), b, rng.randint(1, d - 1), d, rng.choice("+×" if not is_hard else "+-×")


def render_fraction(parameters: Any, is_chinese: bool, rng: Rng) -> Draft:
    a, b, c, d, sign = parameters
    if sign == "-" and a * d <= c * b:
        a, b, c, d = (c, d, a, b) if a * d != c * b else (a + b, b, c, d)
    if sign == "×":
        over, under = a * c, b * d
        lines = [f"{a}*{c}={over}, {b}*{d}={under}: {over}/{under}"]
    else:
        over, under = (a * d + c * b if sign == "+" else a * d - c * b), b * d
        lines = [f"{b}*{d}={under}", f"{a}*{d}={a * d}, {c}*{b}={c * b}"]
        lines.append(columns.add(a * d, c * b) if sign == "+" else columns.subtract(a * d, c * b))
    if under > 1:
        lines.append(columns.euclid(max(over, under), min(over, under)))
    step, answer = columns.reduced(over, under)
    english = ("Compute {} and reduce the result.", "What is {} in lowest terms?")
    chinese = ("计算 {}，结果化为最简分数。", "{} 等于多少？请约分。")
    text = rng.choice(chinese if is_chinese else english).format(f"{a}/{b} {sign} {c}/{d}")
    return Draft(text, "\n".join([*lines, step]), answer)


def draw_percent(rng: Rng, is_hard: bool) -> tuple[Any, ...]:
    if is_hard:
        return rng.randint(11, 99), rng.randint(2, 99) * 100, rng.choice(("of", "off", "up"))
    return rng.randint(1, 19) * 5, rng.randint(2, 30) * 20, rng.choice(("of", "off", "up"))


def render_percent(parameters: Any, is_chinese: bool, rng: Rng) -> Draft:
    p, n, kind = parameters
    part = p * n // 100
    product = columns.multiply(n // 20, p // 5) if n % 100 else columns.multiply(n // 100, p)
    factors = f"{p}/5={p // 5}, {n}/20={n // 20}" if n % 100 else f"{n}/100={n // 100}"
    lines = [f"{p}%*{n}: {factors}", product]
    answer = {"of": part, "off": n - part, "up": n + part}[kind]
    if kind != "of":
        lines.append(columns.subtract(n, part) if kind == "off" else columns.add(n, part))
    things = ("书包", "台灯", "手表", "外套") if is_chinese else ("bag", "lamp", "watch", "coat")
    thing = rng.choice(things)
    english = {
        "of": f"What is {p}% of {n}?",
        "off": f"A {thing} costs {n} yuan. The price is cut by {p}%. What is the new price in yuan?",
        "up": f"A {thing} costs {n} yuan. The price rises by {p}%. What is the new price in yuan?",
    }
    chinese = {
        "of": f"{n} 的 {p}% 是多少？",
        "off": f"一个{thing}原价 {n} 元，降价 {p}%，现价多少元？",
        "up": f"一个{thing}原价 {n} 元，涨价 {p}%，现价多少元？",
    }
    return Draft((chinese if is_chinese else english)[kind], "\n".join(lines), str(answer))


def draw_linear(rng: Rng, is_hard: bool) -> tuple[Any, ...]:
    letter = rng.choice("xyn")
    if is_hard:
        a, x = rng.randint(5, 12), rng.randint(3, 60)
        c = rng.randint(2, a - 1)
        return a, rng.randint(1, 99), c, x, letter
    return rng.randint(2, 9), rng.randint(1, 60), 0, rng.randint(2, 30), letter


def render_linear(parameters: Any, is_chinese: bool, rng: Rng) -> Draft:
    a, b, c, x, letter = parameters
    right = (a - c) * x + b  # the constant on the right: a*x + b = c*x + right
    lines = []
    if c:
        side = f"{c}{letter} + {right}"
        lines.append(f"{a}-{c}={a - c}: {'' if a - c == 1 else a - c}{letter}={right}-{b}")
    else:
        side = str(right)
        lines.append(f"{a}{letter}={right}-{b}")
    lines.append(columns.subtract(right, b))
    if a - c > 1:
        lines.append(columns.divide(right - b, a - c))
    lines.append(f"{letter}={x}")
    equation = f"{a}{letter} + {b} = {side}"
    english = (f"Solve for {letter}: {equation}", f"Find {letter} if {equation}.")
    chinese = (f"解方程：{equation}", f"已知 {equation}，求 {letter}。")
    return Draft(rng.choice(chinese if is_chinese else english), "\n".join(lines), str(x))


def draw_base(rng: Rng, is_hard: bool) -> tuple[Any, ...]:
    base = rng.choice((2, 3, 5, 8)) if is_hard else 2
    value = rng.randint(64, 700) if is_hard else rng.randint(4, 127)
    return base, value, rng.choice(("to", "from"))


def in_base(value: int, base: int) -> str:
    """The digits of a positive number, highest first."""
    digits = ""
    while value:
        digits = str(value % base) + digits
        value //= base
    return digits


def render_base(parameters: Any, is_chinese: bool, rng: Rng) -> Draft:
    base, value, way = parameters
    digits = in_base(value, base)
    if way == "to":
        steps, rest = [], value
        while rest:
            steps.append(f"{rest}={base}*{rest // base}+{rest % base}")
            rest //= base
        lines = "\n".join([*steps, f"{', '.join(digits[::-1])} -> {digits}"])
        english = f"Write the decimal number {value} in base {base}."
        chinese = f"把十进制数 {value} 写成 {base} 进制。"
        return Draft(chinese if is_chinese else english, lines, digits)
    total, steps = 0, []
    for digit in digits:
        steps.append(f"{total}*{base}+{digit}={total * base + int(digit)}")
        total = total * base + int(digit)
    english = f"The number {digits} is in base {base}. Write it in decimal."
    chinese = f"{base} 进制数 {digits} 等于十进制的多少？"
    return Draft(chinese if is_chinese else english, "\n".join(steps), str(value))


def draw_divisor(rng: Rng, is_hard: bool) -> tuple[Any, ...]:
    if is_hard or rng.random() < 0.4:
        common = rng.randint(2, 25 if is_hard else 12)
        a, b = rng.sample(range(2, 30 if is_hard else 12), 2)
        return ("gcd", max(a, b) * common, min(a, b) * common)
    return "remainder", rng.randint(100, 9999), rng.randint(3, 9)


def render_divisor(parameters: Any, is_chinese: bool, rng: Rng) -> Draft:
    kind, a, b = parameters
    if kind == "gcd":
        english = (f"What is the greatest common divisor of {a} and {b}?", f"Find gcd({a}, {b}).")
        chinese = (f"{a} 和 {b} 的最大公约数是多少？", f"求 gcd({a}, {b})。")
        return Draft(rng.choice(chinese if is_chinese else english), columns.euclid(a, b), str(gcd(a, b)))
    text = f"{a} 除以 {b} 的余数是多少？" if is_chinese else f"What is the remainder when {a} is divided by {b}?"
    return Draft(text, columns.divide(a, b), str(a % b))


FAMILIES = (
    Family("sum", "math", draw_sum, render_sum),
    Family("product", "math", draw_product, render_product),
    Family("precedence", "math", draw_precedence, render_precedence),
    Family("fraction", "math", draw_fraction, render_fraction),
    Family("percent", "math", draw_percent, render_percent),
    Family("linear", "math", draw_linear, render_linear),
    Family("base", "math", draw_base, render_base),
    Family("divisor", "math", draw_divisor, render_divisor),
)
