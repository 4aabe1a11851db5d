"""Hand-written right and wrong texts of the four types, and properties of the gate, the extraction and the comparisons."""

import re
import sys
import time
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qcompile.evaluate import CASE_TYPES, Case, check_answer, extract_answer, parse_content
from qcompile.evaluate.formats import EXTRACTION, OFFICIAL_GATE
from qcompile.evaluate.math_answer import as_rational, is_same_math, stop_worker, unboxed
from qcompile.evaluate.math_kinds import are_of_other_kind
from qcompile.evaluate.math_writing import plainly_written
from qcompile.evaluate.sandbox import Limits
from qcompile.evaluate.short_answer import as_number, is_same_choice, is_same_short_answer, normalise_short_answer
from qcompile.evaluate.units import has_other_unit
from tests.evaluate import pairs_choice, pairs_code, pairs_math, pairs_short

LIMITS = Limits(wall_s=10.0, cpu_s=1)
CHOICES = {"A": "14.06", "B": "13.17", "C": "14.4", "D": "14.26"}


@pytest.fixture(scope="module", autouse=True)
def _no_worker_left():
    yield
    stop_worker()


def judged(case: Case, text: str, right: bool, is_format_ok: bool) -> None:
    verdict = check_answer(case, text, LIMITS)
    assert verdict.is_correct is right, (text, verdict)
    assert bool(verdict.reason) is not right
    assert parse_content(text).is_format_ok is is_format_ok
    assert (OFFICIAL_GATE.match(text) is not None) is is_format_ok


def named(pairs: list[tuple[object, str, bool, bool]]) -> list[object]:
    return [pytest.param(*pair, id=f"{n}-{'right' if pair[2] else 'wrong'}") for n, pair in enumerate(pairs)]


@pytest.mark.parametrize("module", [pairs_choice, pairs_math, pairs_short, pairs_code])
def test_there_are_enough_pairs(module: object) -> None:
    pairs = module.PAIRS  # type: ignore[attr-defined]
    verdicts = Counter(right for _, _, right, _ in pairs)
    assert min(verdicts.values()) >= 25
    assert len({(str(expected), text) for expected, text, _, _ in pairs}) == len(pairs) >= 60


@pytest.mark.parametrize(("expected", "text", "right", "is_format_ok"), named(pairs_choice.PAIRS))
def test_choice(expected: str, text: str, right: bool, is_format_ok: bool) -> None:
    judged(Case("x", "choice", "?", CHOICES, (expected,)), text, right, is_format_ok)


@pytest.mark.parametrize(("expected", "text", "right", "is_format_ok"), named(pairs_math.PAIRS))
def test_math(expected: str, text: str, right: bool, is_format_ok: bool) -> None:
    judged(Case("x", "math", "?", answers=(expected,)), text, right, is_format_ok)


@pytest.mark.parametrize(("expected", "text", "right", "is_format_ok"), named(pairs_short.PAIRS))
def test_generic(expected: str, text: str, right: bool, is_format_ok: bool) -> None:
    judged(Case("x", "generic-generate", "?", answers=(expected,)), text, right, is_format_ok)


@pytest.mark.parametrize(("tests", "text", "right", "is_format_ok"), named(pairs_code.PAIRS))
def test_code(tests: tuple[str, ...], text: str, right: bool, is_format_ok: bool) -> None:
    judged(Case("x", "code-generate", "?", tests=tests), text, right, is_format_ok)


def test_numbers_need_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is listed under NUMBERS is decided here, all but a few odd ones: it works without math-verify, and at once."""
    asked = []
    monkeypatch.setattr("qcompile.evaluate.math_answer._worker.ask", lambda *pair: asked.append(pair))
    for expected, text, right, _ in pairs_math.NUMBERS:
        before = len(asked)
        verdict = is_same_math(extract_answer("math", text)[0], expected)
        assert len(asked) > before or verdict is right, text
    assert len(asked) <= 5, asked


def test_any_of_several_answers_will_do() -> None:
    case = Case("x", "generic-generate", "?", answers=("NYC", "New York"))
    for text, right in (("Answer: nyc", True), ("Answer: New York", True), ("Answer: York", False)):
        assert check_answer(case, text).is_correct is right
    assert check_answer(case, "Answer: York").reason == "expected NYC or New York"


@pytest.mark.parametrize("case_type", CASE_TYPES)
def test_an_unknown_answer_is_not_judged(case_type: str) -> None:
    verdict = check_answer(Case("x", case_type, "?", CHOICES if case_type == "choice" else {}), "Answer: C")
    assert verdict.is_correct is None
    assert verdict.reason == "no known answer"


# the gate


PIECES = st.sampled_from(
    [
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "\n",
        " ",
        "a",
        "Answer: C",
        "<think",
        "答",
        "\r",
        "\u2028",
        "$",
        "",
    ]
)


@settings(max_examples=1500, deadline=None)
@given(st.lists(PIECES, max_size=14).map("".join))
def test_the_gate_is_the_official_expression(text: str) -> None:
    match = OFFICIAL_GATE.match(text)
    parsed = parse_content(text)
    assert parsed.is_format_ok == (match is not None)
    if match is not None:
        assert (parsed.thinking, parsed.answer) == match.groups()
    else:
        assert parsed.answer == text


def test_the_gate_takes_linear_time() -> None:
    text = "<think>" + "</think> <answer>" * 60_000
    started = time.process_time()  # not the clock: machines stall
    assert not parse_content(text).is_format_ok
    assert time.process_time() - started < 1


@settings(max_examples=300)
@given(st.text(), st.sampled_from(CASE_TYPES))
def test_extraction_is_the_official_expression(text: str, case_type: str) -> None:
    content = f"<think>x</think><answer>{text}</answer>"
    answer = parse_content(content).answer
    found = re.search(EXTRACTION[case_type].pattern, answer, EXTRACTION[case_type].flags)
    assert extract_answer(case_type, content) == ((found[1], True) if found else (answer, False))


@given(st.text(alphabet=st.characters(exclude_characters="\n", exclude_categories=["Cs"])), st.text(max_size=5))
def test_what_stands_in_the_answer_comes_out(value: str, thinking: str) -> None:
    content = f"<think>{thinking}</think>\n<answer>Answer:|{value}</answer>".replace("|", "")
    if parse_content(content).answer == f"Answer:{value}" and value.strip():
        assert extract_answer("generic-generate", content)[0].strip() == value.strip()


# comparisons


@given(st.sampled_from("ABCD"), st.text("ABCDabcd ,", max_size=4))
def test_a_choice_is_one_letter(expected: str, given_text: str) -> None:
    assert is_same_choice(given_text, expected) == (given_text.strip().upper() == expected)


@given(st.fractions(max_denominator=10**6))
def test_every_way_to_write_a_fraction(value: Fraction) -> None:
    over, under = value.numerator, value.denominator
    for text in (f"{over}/{under}", f"\\frac{{{over}}}{{{under}}}", f"\\boxed{{\\dfrac{{{over}}}{{{under}}}}}"):
        assert as_rational(unboxed(text)) == value
        assert is_same_math(text, f"{2 * over}/{2 * under}")
        assert not is_same_math(text, f"{over + 1}/{under}")


@given(st.decimals(min_value=-(10**9), max_value=10**9, places=3))
def test_every_way_to_write_a_decimal(value: object) -> None:
    plain, grouped = f"{value:f}", f"{value:,f}"
    assert is_same_math(plain, grouped)
    assert is_same_short_answer(plain, grouped)
    assert is_same_short_answer(f" {plain}0 ", plain)
    assert is_same_math(f"${grouped}$", plain)


@given(st.text(max_size=40))
@example('0\r",')
@example('a"",b')
def test_normalising_twice_changes_nothing_more(text: str) -> None:
    once = normalise_short_answer(text)
    assert normalise_short_answer(once) == once


@given(st.lists(st.integers(-500, 500), min_size=2, max_size=5))
def test_a_list_is_not_a_number(values: list[int]) -> None:
    listed = str(values)
    assert is_same_short_answer(listed.replace(" ", ""), listed)
    assert is_same_short_answer(", ".join(map(str, values)), listed)
    assert not is_same_short_answer("".join(map(str, values)), listed)
    assert not is_same_short_answer(listed, "".join(map(str, values)))


MATHEMATICAL = st.text("0123456789.,-+/!^_{}()[]\\$ 千万亿米x√！７", max_size=30)


@settings(max_examples=300)
@given(st.text(max_size=30) | MATHEMATICAL, st.text(max_size=30) | MATHEMATICAL)
def test_comparisons_never_raise(one: str, other: str) -> None:
    is_same_choice(one, other)
    is_same_short_answer(one, other)
    as_number(one)
    as_rational(one)
    unboxed(one)
    plain, others = plainly_written(f"{one} \\boxed{{{other}}}{one}"), (unboxed(one), plainly_written(other))
    are_of_other_kind(unboxed(plain), others[0], as_rational)
    has_other_unit(*others, as_rational)


# math-verify's process


@pytest.mark.parametrize("bomb", ["9^{9^{9^{9}}}", "(" * 500, "\\frac{" * 300, "x" * 5000, "\\sqrt{" * 200 + "}" * 200])
def test_a_bomb_is_wrong_and_the_next_answer_is_judged(bomb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.evaluate.math_answer._TIMEOUT_S", 3.0)
    started = time.monotonic()
    assert not is_same_math(bomb, "\\sqrt{5}")
    assert time.monotonic() - started < 20
    assert is_same_math("\\sqrt{20}/2", "\\sqrt{5}")


def test_files_in_the_working_directory_are_not_run_in_place_of_pythons(tmp_path, monkeypatch) -> None:
    for name in ("random", "sympy", "math_verify"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [place for place in sys.path if place])
    stop_worker()
    assert is_same_math("\\sqrt{20}/2", "\\sqrt{5}")


def test_a_worker_that_was_killed_is_replaced() -> None:
    from qcompile.evaluate.math_answer import _worker

    assert is_same_math("\\sqrt{20}/2", "\\sqrt{5}")
    assert _worker._process is not None
    _worker._process.kill()
    _worker._process.wait()
    assert is_same_math("\\sqrt{20}/2", "\\sqrt{5}")
