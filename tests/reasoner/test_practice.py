"""What GRPO is given to practise: families by what they teach, and solutions where nothing is solved."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from models.reasoner import corpus, probe
from models.reasoner.architectures import load_tokenizer
from models.reasoner.data import FAMILIES
from models.reasoner.demonstrations import demonstrate
from models.reasoner.rewards import problem_of

pytestmark = pytest.mark.torch


def test_guessing_among_four_is_not_worth_practising() -> None:
    families = {
        "knights/hard": {"pass_1": 0.25, "pass_k": 1.0, "variance": 0.19},
        "sum/hard": {"pass_1": 0.5, "pass_k": 1.0, "variance": 0.25},
        "sum/easy": {"pass_1": 0.5, "pass_k": 1.0, "variance": 0.25},
        "base/hard": {"pass_1": 0.5, "pass_k": 0.5, "variance": 0.0},  # half of its problems always, half never
        "travel/hard": {"pass_1": 1.0, "pass_k": 1.0, "variance": 0.0},
    }
    weights = probe.weights({"families": families})
    assert weights["sum", True] > weights["sum", False] > weights["travel", True]
    assert weights["knights", True] == weights["base", True] == weights["travel", True] > 0
    assert set(weights) == {(family.name, hard) for family in FAMILIES for hard in (False, True)}  # asked or not
    assert weights["list", False] == weights["travel", True]


def test_the_variance_is_that_among_the_samples_of_one_problem() -> None:
    assert probe._summary([4, 0], 4) == {"pass_1": 0.5, "pass_k": 0.5, "variance": 0.0}
    assert probe._summary([2, 2], 4)["variance"] == pytest.approx(1 / 3, abs=1e-4)  # unbiased: 4 / 3 of a quarter


def test_a_group_that_is_hardly_right_is_shown_the_solution() -> None:
    tokenizer = load_tokenizer("micro")
    rows = corpus.asked(3, seed=1, hard_share=0.0, tokenizer_from="micro")
    made = [problem_of(text) for text in rows["problem"]]

    def ids(text: str) -> list[int]:
        return tokenizer(text + tokenizer.eos_token, add_special_tokens=False)["input_ids"]

    solutions = [ids(problem.solution) for problem in made]
    none, wrong = ids("<think>\n?\n</think>\n<answer>?</answer>"), ids("?")
    completions = [
        *[none, wrong, none, wrong],
        *[solutions[1], none, wrong, none],
        *[solutions[2], solutions[2], none, none],
    ]
    problems = [text for text in rows["problem"] for _ in range(4)]
    before = list(completions)
    assert demonstrate(problems, completions, tokenizer, group=4, share=0.25, longest=200) == 2
    assert completions == [*before[:3], solutions[0], *before[4:7], solutions[1], *before[8:]]
    completions = list(before)
    assert demonstrate(problems, completions, tokenizer, group=4, share=0.0, longest=200) == 1
    assert completions == [*before[:3], solutions[0], *before[4:]]
    assert demonstrate(problems, list(before), tokenizer, group=4, share=0.25, longest=3) == 0
