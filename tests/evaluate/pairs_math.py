r"""Texts of math cases: (expected, text, right?, format?)."""

from tests.evaluate.pairs_choice import wrapped


def boxed(given: str, expected: str, right: bool) -> tuple[str, str, bool, bool]:
    return expected, wrapped(f"Answer: \\boxed{{{given}}}"), right, True


def line(given: str, expected: str, right: bool) -> tuple[str, str, bool, bool]:
    return expected, wrapped(f"Answer: {given}"), right, True


# decided in this process: numbers, units
NUMBERS = [
    boxed("42", "42", right=True),
    boxed("42", "\\boxed{42}", right=True),
    boxed("-3", "-3", right=True),
    boxed("−3", "-3", right=True),  # the typographic minus
    boxed("+5", "5", right=True),
    boxed("007", "7", right=True),
    boxed("5.0", "5", right=True),
    boxed("5.", "5", right=True),
    boxed(" 42 ", "42", right=True),
    boxed("1,000", "1000", right=True),
    boxed("1{,}000", "1000", right=True),
    boxed("1\\,000", "1000", right=True),
    boxed("12,345,678", "12345678", right=True),
    boxed("0.5", "\\frac{1}{2}", right=True),
    boxed("\\frac{1}{2}", "0.5", right=True),
    boxed("\\dfrac{2}{4}", "1/2", right=True),
    boxed("\\tfrac{1}{2}", "0.5", right=True),
    boxed("-\\frac{7}{3}", "-7/3", right=True),
    boxed("\\frac{-7}{3}", "-7/3", right=True),
    boxed("\\frac{7}{-3}", "-7/3", right=True),
    boxed("6/8", "3/4", right=True),
    boxed("0.75", "3/4", right=True),
    boxed("5\\text{ cm}", "5", right=True),
    boxed("5\\,\\text{km/h}", "5", right=True),
    boxed("5", "5\\text{ cm}", right=True),
    boxed("12 m", "12 meters", right=True),
    boxed("\\$1.50", "1.5", right=True),
    boxed("1.50 dollars", "1.5", right=True),
    boxed("30元", "30", right=True),
    boxed("30\\text{元}", "30", right=True),
    boxed("12\\text{ cm}^2", "12", right=True),
    line("42", "42", right=True),
    line("$42$", "42", right=True),
    line("$\\boxed{42}$.", "42", right=True),
    line("\\(42\\)", "42", right=True),
    line("\\[42\\]", "42", right=True),
    line("**42**", "42", right=True),
    line("\\boxed{42} apples", "42", right=True),
    line("\\boxed{41} no, \\boxed{42}", "42", right=True),  # the last box counts
    line("\\boxed{42}\nAnswer: \\boxed{43}", "42", right=True),  # the official expression takes the first line
    line("5 cm", "5", right=True),
    boxed("43", "42", right=False),
    boxed("-42", "42", right=False),
    boxed("4.2", "42", right=False),
    boxed("420", "42", right=False),
    boxed("0.333", "\\frac{1}{3}", right=False),
    boxed("0.3333333333", "1/3", right=False),
    boxed("-2.333", "-7/3", right=False),
    boxed("99.99", "100", right=False),
    boxed("1,00", "100", right=False),
    boxed("3/0", "3", right=False),
    boxed("", "42", right=False),
    boxed("5 m", "5 cm", right=False),
    boxed("5\\text{ hours}", "5\\text{ minutes}", right=False),
    boxed("12\\text{ cm}^2", "12\\text{ cm}", right=False),
    boxed("500 cm", "5 m", right=False),  # equal as lengths, but another number than asked for
    line("\\boxed{42} no, \\boxed{41}", "42", right=False),
    line("\\boxed{41}\nAnswer: \\boxed{42}", "42", right=False),
    line("", "42", right=False),
    ("42", wrapped("\\boxed{42}"), True, True),  # no `Answer:`: the raw answer
    ("42", wrapped("so it is \\boxed{42}"), True, True),
    ("42", "Answer: \\boxed{42}", True, False),
    ("42", "<answer>Answer: \\boxed{42}</answer>", True, False),
    ("42", "<think>x</think><answer>Answer: \\boxed{42}</answer> done", True, False),
    ("42", "<think>Answer: 41</think>\n\\boxed{42}", False, False),
    ("42", "", False, False),
]

# decided by math-verify
SYMBOLIC = [
    boxed("\\tfrac12", "1/2", right=True),
    boxed("50\\%", "50\\%", right=True),
    boxed("50\\%", "0.5", right=True),
    boxed("0.50", "50\\%", right=True),
    boxed("\\sqrt 2", "\\sqrt{2}", right=True),
    boxed("2\\sqrt{2}", "\\sqrt{8}", right=True),
    boxed("\\pi\\cdot 2", "2\\pi", right=True),
    boxed("3\\times10^3", "3000", right=True),
    boxed("10^{-3}", "0.001", right=True),
    boxed("2^{10}", "1024", right=True),
    boxed("1\\frac{1}{2}", "1.5", right=True),
    boxed("\\log_2 8", "3", right=True),
    boxed("|-3|", "3", right=True),
    boxed("\\sqrt[3]{8}", "2", right=True),
    boxed("\\binom{4}{2}", "6", right=True),
    boxed("3+4", "7", right=True),
    boxed("90^\\circ", "90", right=True),
    boxed("x=5", "5", right=True),
    boxed("5", "x=5", right=True),
    boxed("x^2+2x+1", "(x+1)^2", right=True),
    boxed("a+b", "b+a", right=True),
    boxed("(1, 2)", "(1,2)", right=True),
    boxed("\\left(1,2\\right)", "(1,2)", right=True),
    boxed("\\{2,1\\}", "\\{1,2\\}", right=True),
    boxed("[0,1)", "[0, 1)", right=True),
    boxed("(-\\infty, 3]", "(-\\infty,3]", right=True),
    boxed("x_1=1,x_2=2", "1,2", right=True),
    boxed("\\text{no solution}", "\\text{no solution}", right=True),
    boxed("1.414", "\\sqrt{2}", right=False),
    boxed("3.14", "\\pi", right=False),
    boxed("x^2+2x", "(x+1)^2", right=False),
    boxed("a-b", "b-a", right=False),
    boxed("2x", "2", right=False),
    boxed("(2,1)", "(1,2)", right=False),
    boxed("[0,1]", "[0,1)", right=False),
    boxed("(0,1)", "[0,1]", right=False),
    boxed("5, 6", "5", right=False),
    boxed("5", "5, 6", right=False),
    boxed("\\pm 2", "2", right=False),
    boxed("yes", "no", right=False),
    boxed("2024-01-05", "2024-01-06", right=False),
    line("12 or 13", "12", right=False),
    line("12 or 13", "13", right=False),
    line("not 5", "5", right=False),
    line("5 and 6", "5", right=False),
    line("十二", "12", right=False),
]
PAIRS = NUMBERS + SYMBOLIC
