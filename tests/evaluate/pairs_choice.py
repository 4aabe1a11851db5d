"""Texts of choice cases: (expected letter, text, right?, format?). C is the expected letter unless said otherwise."""


def wrapped(answer: str, thinking: str = "A is too small.") -> str:
    return f"<think>\n{thinking}\n</think>\n<answer>{answer}</answer>"


def inside(answer: str, right: bool, expected: str = "C") -> tuple[str, str, bool, bool]:
    return expected, wrapped(answer), right, True


def outside(text: str, right: bool, expected: str = "C") -> tuple[str, str, bool, bool]:
    return expected, text, right, False


PAIRS = [
    inside("Answer: C", right=True),
    inside("answer: C", right=True),
    inside("ANSWER: C", right=True),
    inside("Answer: c", right=True),
    inside("Answer:C", right=True),
    inside("Answer :\tC", right=True),
    inside("Answer: $C$", right=True),
    inside("Answer: C.", right=True),
    inside("Answer: C) 14.4", right=True),
    inside("Answer: C, because it is the largest", right=True),
    inside("\nAnswer: C\n", right=True),
    inside("The answer: C", right=True),
    inside("So my final answer: C", right=True),
    inside("**Answer: C**", right=True),
    inside("Answer: C\nAnswer: A", right=True),  # the first one counts
    inside("C", right=True),  # nothing matches: the raw text is compared
    inside(" C ", right=True),
    inside("\nC\n", right=True),
    inside("c", right=True),
    inside("Answer: A", right=True, expected="A"),
    inside("Answer: B", right=True, expected="b"),
    inside("Answer: D", right=True, expected=" D "),
    inside("Answer: because C", right=True, expected="B"),  # the official expression takes the `b`
    inside("Answer: A", right=False),
    inside("Answer: B", right=False),
    inside("Answer: D", right=False),
    inside("Answer: AC", right=False),  # several letters
    inside("Answer: CC", right=False),
    inside("Answer: CD", right=False),
    inside("Answer: ABCD", right=False),
    inside("Answer: ", right=False),
    inside("Answer:", right=False),
    inside("Answer: none", right=False),
    inside("Answer: E", right=False),
    inside("Answer: (C)", right=False),  # the bracket is not in the official expression: no letter is found
    inside("Answer: [C]", right=False),
    inside("Answer: **C**", right=False),
    inside("Answer: \\boxed{C}", right=False),
    inside("Answer: $\\text{C}$", right=False),
    inside("Answer: option C", right=False),
    inside("Answer: 14.4", right=False),
    inside("Answer: because C", right=False),
    inside("Answer: correct is C", right=True),  # "c" of "correct": right by luck, as the contest would count
    inside("Answer: A\nAnswer: C", right=False),
    inside("Answer: Answer: C", right=False),  # takes the `A` of the second word
    inside("Answer: A, C", right=False),
    inside("Answer: A or C", right=False),
    inside("Answer：C", right=False),  # full-width colon: no match, and the raw text is no letter
    inside("答案：C", right=False),
    inside("The answer is C", right=False),
    inside("Answer is C", right=False),
    inside("C.", right=False),
    inside("(C)", right=False),
    inside("C: 14.4", right=False),
    inside("A C", right=False),
    inside("", right=False),
    inside("Answer: Ｃ", right=False),  # full-width letter
    inside("Answer: С", right=False),  # Cyrillic
    inside("Answer: C", right=False, expected="D"),
    inside("Answer: not C", right=False),
    outside("Answer: C", right=True),  # no tags: format lost, answer not
    outside("C", right=True),
    outside("<answer>Answer: C</answer>", right=True),  # missing think
    outside("<think>x<answer>Answer: C</answer>", right=True),
    outside("<think>x</think><answer>Answer: C", right=True),
    outside("<think>x</think>Answer: C", right=True),
    outside("Well.\n<think>x</think><answer>Answer: C</answer>", right=True),
    outside("<think>x</think><answer>Answer: C</answer> Hope this helps", right=True),  # text after the answer
    outside("<think>x</think><answer>Answer: C</answer><|im_end|>", right=True),
    outside("<think>x</think><answer>Answer: C</answer>\n\n", right=True),
    outside("<think>x</think> so <answer>Answer: C</answer>", right=True),
    outside("<Think>x</Think><Answer>Answer: C</Answer>", right=True),
    outside(" <think>x</think><answer>Answer: C</answer>", right=True),
    outside("<think>Answer: A?</think>\nAnswer: C", right=False),  # no gate: the first match of the whole text
    outside("<think>x</think><answer>Answer: A</answer> no, Answer: C", right=False),
    outside("", right=False),
    outside("<think>", right=False),
    ("C", "<think></think><answer>Answer: C</answer>", True, True),
    ("C", "<think>x</think>\n\n \t<answer>Answer: C</answer>", True, True),
    ("C", "<think>x</think><answer>Answer: C</answer>\n", True, True),  # `$` allows one last newline
    ("C", "<think>x</think><answer>Answer: A</answer><answer>Answer: C</answer>", False, True),
    ("C", "<think>x</think><answer>Answer: C</answer><answer>Answer: A</answer>", True, True),
    ("C", "<think>x</think><answer></think><answer>Answer: C</answer>", True, True),
    ("C", "<think>Answer: A</think><answer>Answer: C</answer>", True, True),
    ("C", "<think>a<think>b</think></think><answer>Answer: C</answer>", True, True),
]
