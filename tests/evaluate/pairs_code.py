"""Texts of code-generate cases: (tests, text, right?, format?)."""

from tests.evaluate.pairs_choice import wrapped

DOUBLE = ("assert double(2) == 4", "assert double(-1) == -2", "assert double(0) == 0")
GOOD = "def double(x):\n    return 2 * x"
BAD = "def double(x):\n    return x + 2"
FENCE = "```"


def fenced(code: str, language: str = "python") -> str:
    return f"{FENCE}{language}\n{code}\n{FENCE}"


def inside(answer: str, right: bool) -> tuple[tuple[str, ...], str, bool, bool]:
    return DOUBLE, wrapped(answer), right, True


def outside(text: str, right: bool) -> tuple[tuple[str, ...], str, bool, bool]:
    return DOUBLE, text, right, False


PAIRS = [
    inside(f"\n{fenced(GOOD)}\n", right=True),
    inside(fenced(GOOD), right=True),
    inside(f"Here it is:\n{fenced(GOOD)}\nDone.", right=True),
    inside(fenced("double = lambda x: 2 * x"), right=True),
    inside(fenced("def double(x: int) -> int:\n    '''Twice x.'''\n    return x + x"), right=True),
    inside(fenced("# doubles\n\n\n" + GOOD + "\n\n"), right=True),
    inside(fenced("def helper(x):\n    return x\n\ndef double(x):\n    return helper(x) * 2"), right=True),
    inside(fenced("class Box:\n    pass\n" + GOOD), right=True),
    inside(fenced("import math\nfrom functools import reduce\n" + GOOD), right=True),
    inside(fenced(GOOD + "\n\nprint(double(3))"), right=True),
    inside(fenced(GOOD + "\n\nassert double(5) == 10"), right=True),
    inside(fenced(GOOD + "\n\nif __name__ == '__main__':\n    raise SystemExit(1)"), right=True),
    inside(fenced("def double(x, factor=2):\n    return factor * x"), right=True),
    inside(fenced("def double(*numbers):\n    return 2 * numbers[0]"), right=True),
    inside(fenced("from typing import List\n" + GOOD), right=True),
    inside(fenced("def double(x):\n\treturn 2 * x"), right=True),
    inside(fenced("def double(x):\n  return 2 * x  # 两倍"), right=True),
    inside(fenced("def 翻倍(x):\n    return 2 * x\ndouble = 翻倍"), right=True),
    inside(
        fenced("def double(x):\n    if x == 0:\n        return 0\n    return double(x - 1) + 2 if x > 0 else -2"),
        right=True,
    ),
    inside(fenced(GOOD) + "\n" + fenced(BAD), right=True),  # several blocks: the first counts
    inside("```\nnotes\n```\n" + fenced(GOOD), right=True),
    inside("```text\nnotes\n```\n" + fenced(GOOD), right=True),
    inside(fenced("def double(x):\r\n    return 2 * x"), right=True),
    inside(GOOD, right=True),  # bare code: nothing matches, the raw answer is run
    inside(f"\n{GOOD}\n", right=True),
    inside(f"```python\n{GOOD}\n    ```", right=True),
    inside(f"  ```python\n{GOOD}\n```", right=True),
    inside(fenced("def double(x):\n    return sum([x, x])"), right=True),
    inside(fenced(GOOD + "\ndef triple(x):\n    return 3 * x"), right=True),
    inside(fenced(BAD + "\n" + GOOD), right=True),  # the later definition holds
    inside(fenced(BAD), right=False),
    inside(fenced(BAD) + "\n" + fenced(GOOD), right=False),
    inside(fenced(GOOD + "\n" + BAD), right=False),
    inside(fenced("def Double(x):\n    return 2 * x"), right=False),  # wrong name
    inside(fenced("def double_number(x):\n    return 2 * x"), right=False),
    inside(fenced("class Solution:\n    def double(self, x):\n        return 2 * x"), right=False),
    inside(fenced("def outer():\n    def double(x):\n        return 2 * x"), right=False),
    inside(fenced("def double():\n    return 4"), right=False),  # wrong signature
    inside(fenced("def double(x, y):\n    return 2 * x"), right=False),
    inside(fenced("def double(x):\n    print(2 * x)"), right=False),  # prints instead of returning
    inside(fenced("def double(x):\n    return str(2 * x)"), right=False),
    inside(fenced("def double(x):\n    return [2 * x]"), right=False),
    inside(fenced("def double(x):\n    pass"), right=False),
    inside(fenced("def double(x):\n    return 4"), right=False),  # fits the first test only
    inside(fenced("def double(x)\n    return 2 * x"), right=False),  # syntax
    inside(fenced("def double(x):\nreturn 2 * x"), right=False),
    inside(fenced("def double(x):\n    return 2 * x)"), right=False),
    inside(fenced("def double(x):\n    return 2 * y"), right=False),
    inside(fenced("def double(x):\n    return 2 * x\n1 / 0"), right=False),
    inside(fenced("import numpy as np\n" + GOOD), right=False),  # the standard library only
    inside(fenced(GOOD + "\nraise SystemExit(0)"), right=False),
    inside(fenced(GOOD + "\nimport os\nos._exit(0)"), right=False),
    inside(fenced(GOOD, "Python"), right=False),  # the official fence is lower case
    inside(fenced(GOOD, "py"), right=False),
    inside(fenced(GOOD, ""), right=False),
    inside(fenced(GOOD, "python3"), right=False),
    inside(fenced(GOOD, "python "), right=False),
    inside(f"```python {GOOD}```", right=False),
    inside(f"```python\n{GOOD}\n", right=False),  # never closed: the raw text has a fence in it
    inside(f"~~~python\n{GOOD}\n~~~", right=False),
    inside(f"`{GOOD}`", right=False),
    inside(f"Answer:\n{GOOD}", right=False),  # bare code with words before it
    inside("2 * x", right=False),
    inside(fenced(""), right=False),
    inside("", right=False),
    inside(fenced("function double(x) { return 2 * x; }"), right=False),
    inside(fenced("```python\n" + GOOD), right=False),
    inside(fenced(">>> " + GOOD), right=False),
    inside(fenced("while True: pass\n" + GOOD), right=False),
    inside(fenced("print('x' * 10_000_000)\n" + GOOD), right=False),
    outside(fenced(GOOD), right=True),
    outside(f"<answer>{fenced(GOOD)}</answer>", right=True),
    outside(f"<think>x</think><answer>{fenced(GOOD)}</answer>\nThis doubles.", right=True),
    outside(f"<think>try\n{fenced(BAD)}\n</think>\n{fenced(GOOD)}", right=False),  # the first block of the whole text
    outside(f"<think>x</think><answer>{GOOD}", right=False),
    outside("", right=False),
    (DOUBLE, wrapped(fenced(GOOD), thinking=fenced(BAD)), True, True),  # a block in the thinking does not count
    (DOUBLE, wrapped(fenced(BAD), thinking=fenced(GOOD)), False, True),
    (("double(1)", "import math", "assert double(math.floor(2.5)) == 4"), wrapped(fenced(GOOD)), True, True),
    (("assert double(2) == 4", "this is no test"), wrapped(fenced(GOOD)), False, True),
]
