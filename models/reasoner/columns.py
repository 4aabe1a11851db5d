"""Written arithmetic, digit by digit: the small steps a small model can learn."""

from math import gcd


def add(a: int, b: int) -> str:
    """`347+285: 7+5=12, 4+8+1=13, 3+2+1=6 -> 632`; one-digit sums in one go."""
    if a < 10 and b < 10:
        return f"{a}+{b}={a + b}"
    steps, carry = [], 0
    left, right = str(a)[::-1], str(b)[::-1]
    for position in range(max(len(left), len(right))):
        x = left[position : position + 1] or "0"
        y = right[position : position + 1] or "0"
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}{'+1' if carry else ''}={total}")
        carry = total // 10
    return f"{a}+{b}: {', '.join(steps)} -> {a + b}"


def subtract(a: int, b: int) -> str:
    """`532-178: 12-8=4, 13-1-7=5, 5-1-1=3 -> 354`; a smaller minuend is turned round first."""
    if a < b:
        return f"{a}<{b}\n{subtract(b, a)}\n{a}-{b}=-{b - a}"
    if a < 20 and b < 10:
        return f"{a}-{b}={a - b}"
    steps, borrow = [], 0
    left, right = str(a)[::-1], str(b)[::-1]
    for position, digit in enumerate(left):
        y = int(right[position : position + 1] or "0")
        lift = int(digit) - borrow - y < 0
        value = int(digit) + 10 * lift - borrow - y
        steps.append(f"{int(digit) + 10 * lift}{'-1' if borrow else ''}-{y}={value}")
        borrow = int(lift)
    return f"{a}-{b}: {', '.join(steps)} -> {a - b}"


def multiply(a: int, b: int) -> str:
    """One-digit b: `347*6: 7*6=42, 4*6+4=28, 3*6+2=20 -> 2082`; longer b: partial products, then their sum."""
    if b >= 10 and a < 10:
        a, b = b, a
    if a < 10:
        return f"{a}*{b}={a * b}"
    if b >= 10:
        tens, ones = b // 10 * 10, b % 10
        if not ones:
            return f"{multiply(a, b // 10)}\n{a}*{b}={a * b}"
        return (
            f"{a}*{b}={a}*{tens}+{a}*{ones}\n{multiply(a, b // 10)}\n{a}*{tens}={a * tens}\n"
            f"{multiply(a, ones)}\n{add(a * tens, a * ones)}"
        )
    steps, carry = [], 0
    for digit in str(a)[::-1]:
        value = int(digit) * b + carry
        steps.append(f"{digit}*{b}{f'+{carry}' if carry else ''}={value}")
        carry = value // 10
    return f"{a}*{b}: {', '.join(steps)} -> {a * b}"


def divide(a: int, b: int) -> str:
    """Long division, quotient digit and remainder at a time: `847/7: 8=7*1+1, 14=7*2+0, 7=7*1+0 -> 121 r 0`."""
    steps, remainder = [], 0
    for digit in str(a):
        value = remainder * 10 + int(digit)
        steps.append(f"{value}={b}*{value // b}+{value % b}")
        remainder = value % b
    return f"{a}/{b}: {', '.join(steps)} -> {a // b} r {a % b}"


def euclid(a: int, b: int) -> str:
    """The greatest common divisor by remainders, a >= b > 0."""
    steps = []
    while b:
        steps.append(f"{a}%{b}={a % b}")
        a, b = b, a % b
    return f"{', '.join(steps)} -> {a}"


def reduced(over: int, under: int) -> tuple[str, str]:
    """The step that reduces a positive fraction, and the LaTeX of the result."""
    divisor = gcd(over, under)
    step = f"gcd({over},{under})={divisor}: {over // divisor}/{under // divisor}"
    over, under = over // divisor, under // divisor
    return step, str(over) if under == 1 else f"\\frac{{{over}}}{{{under}}}"
