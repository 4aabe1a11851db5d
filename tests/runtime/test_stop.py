"""Stop strings across token borders, and the model's own end tokens."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.runtime.manifest import Manifest
from qcompile.runtime.stop import StopChecker, end_ids
from qcompile.runtime.tokenizer import Tokenizer


def feed(checker: StopChecker, pieces: list[str]) -> tuple[str, str | None]:
    shown = ""
    for piece in pieces:
        text, stop = checker.push(piece)
        shown += text
        if stop is not None:
            return shown, stop
    return shown + checker.flush(), None


def test_a_stop_string_that_straddles_pieces() -> None:
    checker = StopChecker(["</answer>"])
    assert checker.push("42</ans") == ("42", None)
    assert checker.push("wer") == ("", None)
    assert checker.push("> and more") == ("", "</answer>")


def test_it_can_be_kept() -> None:
    assert feed(StopChecker(["</answer>"], include_stop=True), ["x</an", "swer>", "y"]) == (
        "x</answer>",
        "</answer>",
    )


def test_a_false_beginning_is_shown_as_soon_as_it_is_one() -> None:
    checker = StopChecker(["</answer>"])
    assert checker.push("a </a") == ("a ", None)
    assert checker.push("b") == ("</ab", None)


def test_the_first_to_begin_counts_then_the_longest() -> None:
    assert feed(StopChecker(["bc", "abcd"]), ["xabcd"]) == ("x", "abcd")
    assert feed(StopChecker(["ab", "abc"]), ["xabc"]) == ("x", "abc")
    assert feed(StopChecker(["b", "ca"]), ["ab", "ca"]) == ("a", "b")


def test_held_text_comes_out_at_the_end() -> None:
    assert feed(StopChecker(["</answer>"]), ["x</ans"]) == ("x</ans", None)


def test_without_stop_strings_text_passes() -> None:
    assert StopChecker([]).push("anything") == ("anything", None)


@given(
    st.text("ab<", max_size=30),
    st.lists(st.text("ab<", min_size=1, max_size=4), min_size=1, max_size=3),
    st.data(),
)
def test_pieces_do_not_change_the_text(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    shown, stop = feed(StopChecker(stops), pieces)
    found = [text.find(s) for s in stops if s in text]
    if not found:
        assert (shown, stop) == (text, None)
    else:  # an earlier, longer one may still have been incomplete when a shorter one ended the text
        assert stop in stops
        assert text.startswith(shown + stop)
        assert not any(s in shown for s in stops)


def test_nothing_of_a_stop_string_is_ever_shown() -> None:
    for cut in range(1, 9):
        checker = StopChecker(["</answer>"])
        first, _ = checker.push("</answer>"[:cut])
        second, stop = checker.push("</answer>"[cut:])
        assert (first, second, stop) == ("", "", "</answer>")


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        (({"eos_token_id": [402, 400]}, {}), [402, 400]),
        (({"eos_token_id": 7}, {"eos_token_id": 8}), [7]),
        (({}, {"eos_token_id": 8}), [8]),
        (({"eos_token_id": "x"}, {"eos_token_id": None}), [402]),
        (({}, {}), [402]),
    ],
)
def test_end_ids(model: Path, configs: tuple[dict[str, object], ...], expected: list[int]) -> None:
    assert end_ids(configs, Tokenizer(model, Manifest.load(model))) == expected
