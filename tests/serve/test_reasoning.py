"""Thinking and answer, however the text arrives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.serve.reasoning import ReasoningSplitter

PIECES = st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "<", "/", "a", " ", "\n", "think>"]))


def split(style: str, pieces: list[str], *, is_open: bool = False) -> tuple[str, str]:
    splitter = ReasoningSplitter(style, is_open)
    parts = [*map(splitter.push, pieces), splitter.flush()]
    return "".join(p[0] for p in parts), "".join(p[1] for p in parts)


@pytest.mark.parametrize(
    ("style", "text", "wanted"),
    [
        ("none", "<think>a</think>b", ("", "<think>a</think>b")),
        ("think", "<think>\n1 + 1\n</think>\n\ntwo\n", ("1 + 1", "two\n")),
        ("think", "  <think>a</think><answer>b</answer>", ("a", "<answer>b</answer>")),
        ("think-answer", "<think>\na\n</think>\n<answer>\nb <c\n</answer>", ("a", "b <c")),
        ("think-answer", "<think>a</think><answer>b", ("a", "b")),
        ("think", "<think>cut off", ("cut off", "")),
        ("think", "no tags at all", ("", "no tags at all")),
        ("think", "late <think>a</think>", ("", "late <think>a</think>")),
        ("think", "<thin", ("", "<thin")),
        ("think", "", ("", "")),
    ],
)
def test_the_two_sides(style: str, text: str, wanted: tuple[str, str]) -> None:
    assert split(style, [text]) == wanted
    assert split(style, list(text)) == wanted


def test_a_prompt_that_opened_the_tag() -> None:
    assert split("think", ["a", "</thi", "nk>", "b"], is_open=True) == ("a", "b")


@given(st.sampled_from(["none", "think", "think-answer"]), PIECES, st.booleans())
def test_the_cuts_change_nothing(style: str, pieces: list[str], is_open: bool) -> None:
    text = "".join(pieces)
    whole = split(style, [text], is_open=is_open)
    assert split(style, pieces, is_open=is_open) == whole
    assert split(style, list(text), is_open=is_open) == whole
