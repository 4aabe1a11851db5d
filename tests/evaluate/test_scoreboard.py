"""The scoreboard's numbers, worked out by hand, its table, and the page."""

import json
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from qcompile.errors import EvaluateError
from qcompile.evaluate import Case
from qcompile.evaluate.cases import LineProblem
from qcompile.evaluate.page import page_html, visible, write_page
from qcompile.evaluate.sample import Generated, Judgement, Sample
from qcompile.evaluate.scoreboard import Attempt, CaseResult, Run, scoreboard
from qcompile.evaluate.settings import EvalSettings, token_limits
from qcompile.evaluate.table import render
from tests.evaluate.scripted_engine import right_form

GOOD, BAD = right_form("Answer: 1"), "no tags"
ABOUT = {
    "model": {"path": "somewhere/model", "manifest_sha256": "f" * 64},
    "data": {"path": "cases.jsonl", "sha256": "e" * 64},
    "settings": {"batch_size": 4, "seed": 0},
    "machine": {},
}


def attempt(
    correct: bool | None, text: str = GOOD, tokens: int = 10, reason: str = "stop", ttft: float = 0.1
) -> Attempt:
    sample = Sample(text, reason, 20, tokens, ttft, ttft + 0.5)
    return Attempt(sample, Judgement(correct, "1", "" if correct else "expected 1"))


def result(case_type: str, name: str, *attempts: Attempt, known: bool = True, error: str = "") -> CaseResult:
    tests = ("assert True",) if known and case_type == "code-generate" else ()
    answers = ("1",) if known and case_type != "code-generate" else ()
    case = Case(name, case_type, f"What is {name}?", answers=answers, tests=tests, line=3)
    return CaseResult(case, f"What is {name}? Think.", attempts, error)


def run_of(*results: CaseResult, samples: int = 3, temperature: float = 0.0, **fields: Any) -> Run:
    options = EvalSettings(token_limits((), 64), samples=samples, temperature=temperature)
    return Run([*results], fields.pop("problems", []), options, Generated(600, 3.0), dict(ABOUT), **fields)


@pytest.fixture
def mixed() -> Run:
    return run_of(
        result("choice", "c0", attempt(True)),
        result("choice", "c1", attempt(False, BAD, 64, "length", 0.3)),
        result("math", "m0", attempt(True, BAD)),
        result("math", "m1", attempt(None), known=False),
        result("math", "m2", error="too long"),
        result("code-generate", "p0", attempt(False), attempt(True), attempt(False, BAD)),
        result("code-generate", "p1", attempt(True), attempt(False), attempt(False)),
        problems=[LineProblem(9, "not JSON: <b>x</b>")],
        notes=["a <script>note</script>"],
    )


def test_the_numbers(mixed: Run) -> None:
    board = scoreboard(mixed)
    score = board["score"]
    assert score["cases"] == 7
    assert (score["format"]["count"], score["format"]["total"]) == (4, 7)
    assert (score["format_all_texts"]["count"], score["format_all_texts"]["total"]) == (7, 10)
    assert (score["accuracy"]["count"], score["accuracy"]["total"]) == (3, 6)  # m1 is not known, m2 counts as wrong
    assert score["accuracy"]["interval_95"] == pytest.approx([0.1876, 0.8124], abs=1e-4)
    assert score["cut_off"] == score["cut_off"] | {"count": 1, "total": 10, "share": 0.1}
    assert score["output_tokens"] == {"mean": 15.4, "median": 10, "p95": pytest.approx(39.7), "max": 64}
    assert score["errors"] == 1
    assert list(board["by_type"]) == ["choice", "math", "code-generate"]
    code = board["by_type"]["code-generate"]
    assert {k: share["share"] for k, share in code["pass_at"].items()} == {"1": 0.5, "3": 1.0}
    assert code["accuracy"]["share"] == 0.5
    assert "pass_at" not in board["by_type"]["math"]
    assert [case["verdict"] for case in board["cases"]] == [
        "right",
        "wrong",
        "right",
        "unknown",
        "error",
        "wrong",
        "right",
    ]
    assert board["speed"]["tokens_per_s"] == 200
    assert board["speed"]["ttft_s"]["median"] == 0.1
    assert board["speed"]["decode_tokens_per_s_each"]["median"] == 18
    assert board["schema_version"] == 1
    assert json.loads(json.dumps(board)) == board


def test_drawn_texts_use_chens_estimate() -> None:
    board = scoreboard(
        run_of(
            result("code-generate", "p", *(attempt(n < 2) for n in range(5))),
            result("code-generate", "q", attempt(False), attempt(True)),  # three texts are missing: wrong
            samples=5,
            temperature=0.8,
        )
    )
    passes = {k: share["share"] for k, share in board["score"]["pass_at"].items()}
    assert passes == {"1": pytest.approx((0.4 + 0.2) / 2), "3": pytest.approx((0.9 + 0.6) / 2), "5": 1.0}


def test_one_sample_has_pass_at_1_only() -> None:
    board = scoreboard(run_of(result("code-generate", "p", attempt(True)), samples=1))
    assert list(board["score"]["pass_at"]) == ["1"]


def test_nothing_was_generated() -> None:
    board = scoreboard(run_of(result("math", "m", error="too long")))
    assert board["score"]["cut_off"]["share"] is None
    assert "no text was generated" in shown(board)
    assert "too long" in page_html(board)


def shown(board: dict[str, Any], width: int = 80) -> str:
    console = Console(width=width, file=StringIO())
    console.print(render(board))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_table_fits_into_80_columns(mixed: Run) -> None:
    text = shown(scoreboard(mixed))
    assert "…" not in text
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert lines["%"] == ["%", "cases", "format", "accuracy", "interval", "pass@1", "pass@3", "tokens", "cut", "off"]
    assert lines["code-generate"] == ["code-generate", "2", "100.0", "50.0", "9.5–90.5", "50.0", "100.0", "10", "0.0"]
    assert lines["all"][:4] == ["all", "7", "57.1", "50.0"]
    assert "600 tokens in 3.0 s: 200 tokens/s; TTFT median 100 ms" in text
    assert "note: a <script>note</script>" in text


class _Reader(HTMLParser):
    """Collects tags, and fails on one that is not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    def cards(self) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.seen if tag == "details"]


def read(page: str) -> _Reader:
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_shows_every_case(mixed: Run) -> None:
    page = page_html(scoreboard(mixed))
    reader = read(page)
    assert [(card["data-type"], card["data-verdict"]) for card in reader.cards()] == [
        ("choice", "right"),
        ("choice", "wrong"),
        ("math", "right"),
        ("math", "unknown"),
        ("math", "error"),
        ("code-generate", "wrong"),
        ("code-generate", "right"),
    ]
    assert [card["data-badformat"] for card in reader.cards()] == ["0", "1", "1", "0", "0", "0", "0"]
    assert [card["data-cutoff"] for card in reader.cards()] == ["0", "1", "0", "0", "0", "0", "0"]
    text = "".join(reader.texts)
    for wanted in ("What is c0? Think.", "Answer: 1", "expected 1", "assert True", "too long", "no tags"):
        assert wanted in text
    values = {attrs.get("data-value") for tag, attrs in reader.seen if tag == "button"}
    assert values >= {
        "",
        "choice",
        "math",
        "code-generate",
        "right",
        "wrong",
        "unknown",
        "error",
        "badformat",
        "cutoff",
    }
    assert "generic-generate" not in values


def test_the_page_needs_no_network(mixed: Run) -> None:
    page = page_html(scoreboard(mixed))
    policies = [attrs["content"] for tag, attrs in read(page).seen if "http-equiv" in attrs]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"]
    assert 'name="viewport" content="width=device-width' in page
    assert not re.search(r"""(?:src|href)\s*=|url\(|@import|https?:|fetch\(|import\(""", page)
    assert not [tag for tag, _ in read(page).seen if tag in ("img", "link", "iframe", "object", "base", "form", "a")]


def test_the_page_of_a_simulated_device_tells_no_times(mixed: Run) -> None:
    mixed.about["simulated"] = True
    text = "".join(read(page_html(scoreboard(mixed))).texts)
    assert "none: a simulated device" in text
    assert "What is c0? Think." in text
    assert "TTFT" not in text
    assert " ms" not in text


NASTY = "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\"'\x00\x1b[31m\u202e{{ 7*7 }}{% x %}"


def test_everything_is_escaped() -> None:
    case = Case(NASTY, "choice", NASTY, {"A": NASTY}, (NASTY,), line=1)
    judgement = Judgement(False, NASTY, NASTY)
    texts = [NASTY, f"<think>{NASTY}</think><answer>{NASTY}</answer>"]
    attempts = tuple(Attempt(Sample(text, "stop", 1, 1, 0.1, 0.2), judgement) for text in texts)
    run = run_of(CaseResult(case, NASTY, attempts, NASTY), problems=[LineProblem(1, NASTY)], notes=[NASTY])
    run.about["model"] = {"path": NASTY, "manifest_sha256": "f" * 64}
    run.about["data"] = {"path": NASTY, "sha256": "e" * 64}
    page = page_html(scoreboard(run))
    reader = read(page)
    assert [tag for tag, _ in reader.seen].count("script") == 1
    assert not [tag for tag, attrs in reader.seen if tag == "img" or "onerror" in attrs]
    text = "".join(reader.texts)
    assert text.count("alert(1)") >= 12
    assert "{{ 7*7 }}" in text
    assert "\\x00\\x1b[31m\\u202e" in text
    assert not set("\x00\x1b\u202e") & set(page)


@settings(max_examples=25, deadline=None)
@given(st.text(max_size=40))
def test_any_text_can_be_shown(text: str) -> None:
    text = text.encode("utf-8", "replace").decode()
    reader = read(page_html(scoreboard(run_of(result("math", "m", attempt(False, text))))))
    assert visible(text) in "".join(reader.texts).replace("\r", "") or not text.strip()


def test_a_page_is_whole_or_not_there(mixed: Run, tmp_path: Path) -> None:
    write_page(scoreboard(mixed), tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8").endswith("</html>")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    with pytest.raises(EvaluateError, match="cannot be written"):
        write_page(scoreboard(mixed), tmp_path / "no" / "page.html")
