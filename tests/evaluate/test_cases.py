"""Case files good and bad, and prompt templates."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import EvaluateError
from qcompile.evaluate import CASE_TYPES, Case, read_cases
from qcompile.evaluate.asking import language_of
from qcompile.evaluate.cases import case_from_record
from qcompile.evaluate.templates import Templates
from qcompile.runtime.manifest import sha256_of

GOOD = {"id": "good", "type": "math", "prompt": "1 + 1", "answer": 2}
CODE = {"id": "x", "type": "code-generate", "prompt": "Write f."}


def read(tmp_path: Path, *lines: Any) -> tuple[list[Case], list[str]]:
    path = tmp_path / "cases.jsonl"
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(raw) + b"\n")
    cases, problems = read_cases(path)
    return cases, [str(problem) for problem in problems]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        (b"nonsense", "not JSON: Expecting value at column 1"),
        (b'{"id": "x"} {"id": "y"}', "not JSON: Extra data at column 13"),
        (b"[" * 100_000, "lists or objects lie too deep inside one another; a case needs two levels"),
        (b'{"id": "x", "prompt": "\xff"}', "not UTF-8: byte 0xff at offset 23"),
        ('{"id": "é"}'.encode("latin-1"), "not UTF-8: byte 0xe9 at offset 8"),
        (b"1" * 5000, "a whole number has thousands of digits; write it as a string"),
        ([GOOD], "a case is a JSON object, not list"),
        (None, "a case is a JSON object, not NoneType"),
        ("text", "a case is a JSON object, not str"),
        ({**GOOD, "id": None}, "'id' is missing, empty or neither a string nor a whole number"),
        ({k: v for k, v in GOOD.items() if k != "id"}, "'id' is missing, empty or neither a string nor a whole number"),
        ({**GOOD, "id": ""}, "'id' is missing, empty or neither a string nor a whole number"),
        ({**GOOD, "id": True}, "'id' is missing, empty or neither a string nor a whole number"),
        ({**GOOD, "id": ["x"]}, "'id' is missing, empty or neither a string nor a whole number"),
        ({**GOOD, "id": "x", "type": "maths"}, "case 'x': unknown type 'maths'; one of choice, math, "),
        ({**GOOD, "id": "x", "type": None}, "case 'x': unknown type None; one of"),
        ({**GOOD, "id": "x", "type": ["math"]}, "case 'x': unknown type ['math']; one of"),
        ({**GOOD, "id": "x", "type": "y" * 9000}, "case 'x': unknown type 'yyyyyyyyy"),
        ({"id": "x", "prompt": "?"}, "case 'x': unknown type None"),
        ({**GOOD, "id": "x", "prompt": ""}, "case 'x': 'prompt' is missing, empty or not a string"),
        ({**GOOD, "id": "x", "prompt": " \n"}, "case 'x': 'prompt' is missing, empty or not a string"),
        ({**GOOD, "id": "x", "prompt": 5}, "case 'x': 'prompt' is missing, empty or not a string"),
        ({**GOOD, "id": "x", "prompt": "\ud800"}, "case 'x': the text holds half a surrogate pair"),
        ({**GOOD, "id": "\udfff"}, "case '\\udfff': the text holds half a surrogate pair"),
        ({**GOOD, "id": "x", "answer": "\ud800"}, "case 'x': the text holds half a surrogate pair"),
        ({**GOOD, "id": "x", "tests": ["\ud800"]}, "case 'x': the text holds half a surrogate pair"),
        ({**GOOD, "id": "x", "answer": {"a": 1}}, "case 'x': 'answer' must be a string, a number or a list of them"),
        ({**GOOD, "id": "x", "answer": [None]}, "case 'x': 'answer' must be a string, a number or a list of them"),
        ({**GOOD, "id": "x", "answer": float("nan")}, "case 'x': 'answer' holds nan, no finite number; write it as a"),
        (
            b'{"id": "x", "type": "math", "prompt": "?", "answer": [1, 1e999]}',
            "case 'x': 'answer' holds inf, no finite",
        ),
        (
            {"id": "x", "type": "choice", "prompt": "?", "choices": {"A": float("-inf")}},
            "case 'x': 'choices' holds -inf, no finite number; write it as a string",
        ),
        *(
            ({**CODE, "tests": tests}, "case 'x': 'tests' must be a string or a list of strings (Python statements)")
            for tests in (1, ["assert f() == 1", 1], True, {"input": 1})
        ),
        ({**GOOD, "id": "x", "answer": True}, "case 'x': 'answer' must be a string, a number or a list of them"),
        ({"id": "x", "type": "choice", "prompt": "?"}, "case 'x': 'choices' must be an object such as"),
        ({"id": "x", "type": "choice", "prompt": "?", "choices": {}}, "case 'x': 'choices' must be an object such as"),
        (
            {"id": "x", "type": "choice", "prompt": "?", "choices": ["a"]},
            "case 'x': 'choices' must be an object such as",
        ),
        (
            {"id": "x", "type": "choice", "prompt": "?", "choices": {"E": "a"}},
            "case 'x': 'choices' has 'E'; the letters are A, B, C, D",
        ),
        (
            {"id": "x", "type": "choice", "prompt": "?", "choices": {"A": ["a"]}},
            "case 'x': the texts of 'choices' must be strings or numbers",
        ),
        ({**GOOD}, "id 'good' was used before, on line 1"),
        ({**GOOD, "prompt": "another"}, "id 'good' was used before, on line 1"),
    ],
)
def test_a_bad_line_is_reported_and_the_others_are_read(tmp_path: Path, line: Any, message: str) -> None:
    cases, problems = read(tmp_path, GOOD, line, {**GOOD, "id": "last"})
    assert [case.id for case in cases] == ["good", "last"]
    assert [case.line for case in cases] == [1, 3]
    assert len(problems) == 1
    assert problems[0].startswith(f"line 2: {message}"), problems[0]
    assert "\n" not in problems[0]
    assert len(problems[0]) < 200


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"id": "x", "type": "choice", "prompt": "?", "choices": {"A": "1", "B": "2"}, "answer": "C"},
            "line 1: case 'x': answer 'C' is none of its choices A, B",
        ),
        (
            {"id": "x", "type": "choice", "prompt": "?", "choices": {"A": "1", "B": "2"}, "answer": 2},
            "line 1: case 'x': answer '2' is none of its choices A, B",
        ),
        (
            {"id": "x", "type": "code-generate", "prompt": "?", "answer": "def f(): pass"},
            "line 1: case 'x': code is judged by 'tests', it has only an 'answer': not judged",
        ),
        (
            {**CODE, "tests": ["assert f() == 1", "assert f() == "]},
            "line 1: case 'x': test 2 is no Python (invalid syntax): no program passes it",
        ),
        (
            {"id": "x", "type": "code-generate", "prompt": "?", "tests": ""},
            "line 1: case 'x': 'tests' has empty text: not judged; fill it in or leave it out",
        ),
        (
            {**GOOD, "id": "x", "answer": [" "]},
            "line 1: case 'x': 'answer' has empty text: not judged; fill it in or leave it out",
        ),
        (
            {**GOOD, "id": "x", "answer": ["", 5]},
            "line 1: case 'x': 'answer' has empty text: the empty ones are left out",
        ),
    ],
)
def test_a_doubtful_line_is_read_and_reported(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    cases, problems = read(tmp_path, record)
    assert len(cases) == 1
    assert problems == [message]


def test_empty_text_is_no_answer_and_no_test() -> None:
    case = case_from_record({**GOOD, "answer": ["", 5, "\n"], "tests": ["", " "]})
    assert (case.answers, case.tests) == (("5",), ())
    assert not case_from_record({**GOOD, "type": "code-generate", "tests": ""}).is_checkable


def test_a_key_given_twice_is_reported(tmp_path: Path) -> None:
    line = b'{"id": "x", "type": "math", "prompt": "2 + 2", "answer": 4, "answer": 5}'
    cases, problems = read(tmp_path, line)
    assert cases[0].answers == ("5",)
    assert problems == ["line 1: case 'x': 'answer' is given more than once; the last one counts"]


def test_what_files_may_hold(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    choice = {
        "id": 7,
        "type": "choice",
        "prompt": "哪个？",
        "choices": {"B": 2, "A": 1.5},
        "answer": ["a", "B"],
        "family": "x",
    }
    lines = ["\ufeff" + json.dumps(GOOD), "", "  ", json.dumps(choice, ensure_ascii=False)]
    path.write_bytes("\r\n".join(lines).encode())  # a BOM, blank lines, CRLF, no last line end
    cases, problems = read_cases(path)
    assert problems == []
    assert cases[0] == Case("good", "math", "1 + 1", answers=("2",), line=1)
    assert cases[1] == Case("7", "choice", "哪个？", {"A": "1.5", "B": "2"}, ("a", "B"), line=4)
    assert list(cases[1].choices) == ["A", "B"]
    assert cases[1].extra == {"family": "x"}


def test_numbers_are_written_in_plain_digits() -> None:
    numbers = [0.00001, 1e16, 1e22, -2.5e-7, 0.1, 3.0, 10**20, "1e-05"]
    texts = case_from_record({**GOOD, "answer": numbers}).answers
    assert texts == (
        *("0.00001", "10000000000000000", "10000000000000000000000", "-0.00000025", "0.1", "3.0"),
        *("100000000000000000000", "1e-05"),
    )
    choices = {"A": 0.00001, "B": "1e-05"}
    assert case_from_record({**GOOD, "type": "choice", "choices": choices}).choices == {"A": "0.00001", "B": "1e-05"}


def test_a_line_of_megabytes_is_no_case(tmp_path: Path) -> None:
    long = b'{"id": "x", "type": "math", "prompt": "' + b"x" * (5 << 20) + b'"}'
    cases, problems = read(tmp_path, GOOD, long, {**GOOD, "id": "last"})
    assert [case.line for case in cases] == [1, 3]
    assert problems == ["line 2: longer than 4194304 bytes"]
    digest = hashlib.sha256()
    read_cases(tmp_path / "cases.jsonl", digest)
    assert digest.hexdigest() == sha256_of(tmp_path / "cases.jsonl")


@pytest.mark.parametrize("content", [b"", b"\n\n", b"  \r\n\t\n", b"\xef\xbb\xbf"])
def test_an_empty_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_bytes(content)
    with pytest.raises(EvaluateError, match="the file is empty"):
        read_cases(path)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(EvaluateError, match="No such file"):
        read_cases(tmp_path / "none.jsonl")
    with pytest.raises(EvaluateError, match="Is a directory"):
        read_cases(tmp_path)


def test_utf_16_is_reported_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD), encoding="utf-16")
    cases, problems = read_cases(path)
    assert cases == []
    assert [problem.line for problem in problems] == [1, 2]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(["id", "type", "prompt", "choices", "answer", "tests", "more"])


@settings(max_examples=400)
@given(st.dictionaries(FIELDS, JSON | st.sampled_from(CASE_TYPES)))
def test_any_record_is_a_case_or_says_why(record: dict[str, Any]) -> None:
    try:
        case = case_from_record(record)
    except EvaluateError as error:
        message = str(error)
    else:
        message = ""
    assert len(message) < 300
    if message:
        return
    assert case.id
    assert case.type in CASE_TYPES
    "".join((case.id, case.prompt, *case.answers, *case.tests, *case.choices.values())).encode()
    Templates.load().prompt(case)


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + raw)
    cases, problems = read_cases(path)
    assert cases[0].id == "good"
    assert len(cases) + len(problems) <= 1 + raw.count(b"\n") + 1


class TestTemplates:
    @pytest.mark.parametrize("case_type", CASE_TYPES)
    @pytest.mark.parametrize("prompt", ["How many?", "多少？"])
    def test_the_hard_constraints_stand_last(self, case_type: str, prompt: str) -> None:
        case = Case("x", case_type, f"  {prompt}\n", {"A": "one", "B": "two"} if case_type == "choice" else {})
        text = Templates.load().prompt(case)
        assert text.startswith(prompt + "\n")
        assert text.endswith("</answer>")
        assert ("逐步" in text or "请先" in text) == (prompt == "多少？")
        assert ("\nA. one\nB. two\n" in text) == (case_type == "choice")
        assert text.index("<think>") > text.index(prompt) + len(prompt)
        assert "<think>" in text.splitlines()[-2 if case_type != "code-generate" else -6]
        assert ("```python\n" in text) == (case_type == "code-generate")
        assert ("\\boxed{" in text) == (case_type == "math")

    def test_placeholders_in_a_prompt_stay(self) -> None:
        case = Case("x", "math", "What is {prompt} and {choices} and {0}?")
        assert Templates.load().prompt(case).startswith("What is {prompt} and {choices} and {0}?")

    def test_a_byte_order_mark_is_no_text(self, tmp_path: Path) -> None:
        path = tmp_path / "own.toml"
        path.write_text("[math]\nen = '{prompt} Go.'\n", encoding="utf-8-sig")
        assert Templates.load(path).prompt(Case("x", "math", "1 + 1?")) == "1 + 1? Go."

    def test_a_file_of_ones_own(self, tmp_path: Path) -> None:
        path = tmp_path / "own.toml"
        path.write_text("system = 'Be brief.'\n[math]\nzh = '{prompt}请算。'\n[choice]\nen = '{choices}|{prompt}'\n")
        own, built_in = Templates.load(path), Templates.load()
        assert own.prompt(Case("x", "math", "一加一？")) == "一加一？请算。"
        assert own.prompt(Case("x", "math", "1 + 1?")) == built_in.prompt(Case("x", "math", "1 + 1?"))
        assert own.prompt(Case("x", "choice", "Which?", {"A": "1"})) == "A. 1|Which?"
        assert own.messages(Case("x", "math", "一"))[0] == {"role": "system", "content": "Be brief."}
        assert [m["role"] for m in built_in.messages(Case("x", "math", "一"))] == ["user"]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[math", "cannot be read as TOML"),
            ("system = 5", "'system' must be a string"),
            ("[maths]\nen = '{prompt}'", r"\[maths\] is no task type"),
            ("math = '{prompt}'", r"math is no table; write \[math\] and under it en ="),
            ("a = " + "[" * 20_000, "lists or tables lie too deep"),
            ("[math]\nde = '{prompt}'", "'de' is no language"),
            ("[math]\nen = 'no place'", r"the text must hold \{prompt\}"),
            ("[choice]\nen = '{prompt}'", r"\[choice\] en: the text must hold \{choices\}"),
            ("[choice]\nen = '{choices}'", r"\[choice\] en: the text must hold \{prompt\}"),
            ("[math]\nen = 5", r"the text must hold \{prompt\}"),
            (b"\xff", "cannot be read as TOML"),
        ],
    )
    def test_a_bad_file(self, tmp_path: Path, text: str | bytes, message: str) -> None:
        path = tmp_path / "own.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(EvaluateError, match=message):
            Templates.load(path)
        with pytest.raises(EvaluateError, match="No such file"):
            Templates.load(tmp_path / "none.toml")

    def test_the_language(self) -> None:
        assert [language_of(text) for text in ("a", "é", "数", "x 数 y", "かな", "")] == [
            "en",
            "en",
            "zh",
            "zh",
            "en",
            "en",
        ]
