"""Whatever happens, every id gets an entry: what is finished as the model wrote it, the rest empty; the log says why."""

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest

from qcompile.package.contest.clock import Budget
from qcompile.package.contest.contest import Contest
from qcompile.package.schemas import load_schema
from qcompile.runtime.errors import TokenizerError
from tests.package.scripted_backend import ScriptedBackend

Make = Callable[..., Contest]
TYPES = ("choice", "math", "generic-generate", "code-generate")


def questions(count: int = 12) -> list[dict[str, Any]]:
    made = [{"id": f"q{i}", "type": TYPES[i % 4], "prompt": f"question {i}."} for i in range(count)]
    for one in made:
        if one["type"] == "choice":
            one["choices"] = {"A": "1", "B": "2"}  # type: ignore[assignment]
    return made


def answer(prompt: str, params: Any) -> str:
    number = prompt.split("question ")[1].split(".")[0]
    return f"<think>t</think><answer>Answer: {number} {'drawn' if params.temperature else 'greedy'}</answer>"


def contents(result: dict[str, Any], asked: list[dict[str, Any]]) -> dict[str, Any]:
    """Check the form and the ids; return the contents by id."""
    jsonschema.validate(json.loads(json.dumps(result)), load_schema("contest_result"))
    entries = result["result"]["results"]
    assert [entry["id"] for entry in entries] == [question["id"] for question in asked]
    for entry in entries:
        assert entry["duration"] >= 0
        first = entry["content"][0] if isinstance(entry["content"], list) else entry["content"]
        assert first in {"", answer(f"question {entry['id'][1:]}.", type("P", (), {"temperature": 0}))}
    return {entry["id"]: entry["content"] for entry in entries}


def log(root: Path) -> str:
    return (root / "contest_log" / "run.jsonl").read_text(encoding="utf-8")


def test_every_question_is_answered_and_code_three_times(contest: Make, tmp_path: Path) -> None:
    asked = questions()
    made = contest({"acl": lambda: ScriptedBackend(answer)})
    found = contents(made.get_results(asked), asked)
    assert all(found.values())
    assert [len(found[f"q{i}"]) for i in (3, 7, 11)] == [3, 3, 3]
    assert found["q3"][1] == found["q3"][2] != found["q3"][0]
    lines = [json.loads(line) for line in log(tmp_path).splitlines()]
    texts = [line for line in lines if line["event"] == "text"]
    assert len(texts) == 12 + 6
    assert {line["backend"] for line in texts} == {"acl"}
    kept = json.loads((tmp_path / "contest_log" / "results-1.json").read_text())
    assert contents(kept, asked) == found


def test_first_texts_come_before_further_ones(contest: Make) -> None:
    backend = ScriptedBackend(answer)
    contest(
        {"acl": lambda: backend}, max_new_tokens={"choice": 9, "math": 8, "generic-generate": 7, "code-generate": 20}
    ).get_results(questions(8))
    order = [int(prompt.split("question ")[1].split(".")[0]) for prompt in backend.asked]
    assert order == [2, 6, 1, 5, 0, 4, 3, 7, 3, 7, 3, 7]


def test_when_time_is_up_the_rest_is_empty(contest: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    now = [0.0]

    def tick() -> None:
        now[0] += 5

    asked = questions()
    made = contest({"acl": lambda: ScriptedBackend(answer, tick)}, lambda: now[0], budget_s=30, expected_questions=12)
    found = contents(made.get_results(asked), asked)
    assert sum(bool(content) for content in found.values()) == 6
    assert "out of time" in log(tmp_path)
    assert "6 of 12 questions have no answer (out of time)" in capfd.readouterr().err


def test_a_question_that_breaks_the_model_costs_no_other(contest: Make, tmp_path: Path) -> None:
    def fragile(prompt: str, params: Any) -> str:
        if "question 5." in prompt:
            raise ZeroDivisionError("poison")
        return answer(prompt, params)

    asked = questions()
    found = contents(
        contest({"acl": lambda: ScriptedBackend(lambda p, s: fragile(p, s) if "1 + 1" not in p else "2")}).get_results(
            asked
        ),
        asked,
    )
    assert [one for one, content in found.items() if not content] == ["q5"]
    assert "ZeroDivisionError: poison" in log(tmp_path)


def test_several_questions_that_fail_alone(contest: Make, tmp_path: Path) -> None:
    def refuse(prompt: str, params: Any) -> str:
        if "1 + 1" in prompt:
            return "2"
        return "ERROR" if any(f"question {i}." in prompt for i in (0, 1, 2, 4)) else answer(prompt, params)

    asked = questions()
    found = contents(contest({"acl": lambda: ScriptedBackend(refuse)}).get_results(asked), asked)
    assert [one for one, content in found.items() if not content] == ["q0", "q1", "q2", "q4"]
    assert "the device said no" in log(tmp_path)
    assert "fallback" not in log(tmp_path)


@pytest.mark.parametrize("style", ["raises", "errors"])
def test_a_device_that_is_lost_is_opened_afresh_once_then_left(
    contest: Make, tmp_path: Path, style: str, capfd: pytest.CaptureFixture[str]
) -> None:
    steps = [0]

    def lost(prompt: str, params: Any) -> str:
        steps[0] += 1
        if steps[0] < 12:
            return answer(prompt, params)
        if style == "raises":
            raise RuntimeError("device lost")
        return "ERROR"

    asked = questions()
    made = contest({"acl": lambda: ScriptedBackend(lost), "onnxruntime": lambda: ScriptedBackend(answer)})
    found = contents(made.get_results(asked), asked)
    assert all(found.values())
    opened = [json.loads(line)["backend"] for line in log(tmp_path).splitlines() if '"opened"' in line]
    assert opened == ["acl", "acl", "onnxruntime"]
    assert "ONNX Runtime on the CPU" in capfd.readouterr().err


def test_a_missing_om_falls_to_the_next_rung(contest: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    asked = questions()
    found = contents(contest({"onnxruntime": lambda: ScriptedBackend(answer)}).get_results(asked), asked)
    assert all(found.values())
    said = capfd.readouterr().err
    assert "WARNING: the .om model on the NPU (CANN's acl) cannot be used: FileNotFoundError" in said
    assert "decode.om: missing -> ONNX Runtime on the CPU" in said
    assert '"fallback"' in log(tmp_path)


def test_without_any_rung_everything_is_empty(contest: Make, tmp_path: Path) -> None:
    asked = questions()
    found = contents(contest({}).get_results(asked), asked)
    assert set(found.values()) == {""}
    assert "no way to run the model is left" in log(tmp_path)


def test_sigterm_hands_back_what_there_is(contest: Make, tmp_path: Path) -> None:
    steps = [0]

    def terminate() -> None:
        steps[0] += 1
        if steps[0] == 5:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(0.5)

    before = signal.getsignal(signal.SIGTERM)
    asked = questions()
    made = contest({"acl": lambda: ScriptedBackend(answer, terminate)})
    found = contents(made.get_results(asked), asked)
    assert 1 <= sum(bool(content) for content in found.values()) <= 5
    assert "asked to stop" in log(tmp_path)
    later = contents(made.get_results(questions(3)), questions(3))
    assert set(later.values()) == {""}
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interrupted_file_does_not_hold_up_the_next(contest: Make, tmp_path: Path) -> None:
    steps = [0]

    def interrupt() -> None:
        steps[0] += 1
        if steps[0] == 3:
            os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(0.05)

    asked = questions(40)
    backend = ScriptedBackend(answer, interrupt)
    made = contest({"acl": lambda: backend})
    found = contents(made.get_results(asked), asked)
    assert sum(bool(content) for content in found.values()) < 40
    assert "KeyboardInterrupt" in log(tmp_path)
    assert all(contents(made.get_results(asked[:4]), asked[:4]).values())
    assert len(backend.asked) < 40


def test_a_step_that_hangs_is_given_up_and_the_next_file_runs_elsewhere(contest: Make, tmp_path: Path) -> None:
    never = threading.Event()
    hanging = ScriptedBackend(answer, lambda: never.wait(30))
    asked = questions(4)
    made = contest(
        {"acl": lambda: hanging, "onnxruntime": lambda: ScriptedBackend(answer)},
        budget_s=0.2,
        grace_s=0.2,
        expected_questions=8,
    )
    assert set(contents(made.get_results(asked), asked).values()) == {""}
    never.set()
    assert "the back end hangs: it is given up" in log(tmp_path)
    made._budget = Budget(60, 8, made._clock)
    assert all(contents(made.get_results(asked), asked).values())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_stops_nothing(contest: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "contest_log").mkdir()
    (tmp_path / "contest_log" / "run.jsonl").symlink_to("/dev/full")
    asked = questions()
    found = contents(contest({"acl": lambda: ScriptedBackend(answer)}).get_results(asked), asked)
    assert all(found.values())
    assert "the log cannot be written (No space left on device); the run goes on without it" in capfd.readouterr().err


def test_entries_that_are_no_questions_keep_their_place(contest: Make) -> None:
    odd = [
        {"id": "a"},
        7,
        {"id": "b", "prompt": "question 1.", "type": "riddle"},
        {"id": "c", "type": "math", "prompt": 3},
    ]
    result = contest({"acl": lambda: ScriptedBackend(answer)}).get_results(odd)["result"]["results"]
    assert [entry["id"] for entry in result] == ["a", "", "b", "c"]
    assert [bool(entry["content"]) for entry in result] == [False, False, True, False]
    assert contest({"acl": lambda: ScriptedBackend(answer)}).get_results([]) == {"result": {"results": []}}


def test_an_entry_that_cannot_be_read_costs_no_other(contest: Make, tmp_path: Path) -> None:
    class Unreadable:
        def __eq__(self, other: object) -> bool:
            raise RuntimeError("no such type")

        __hash__ = None  # type: ignore[assignment]

    odd = [
        {"id": "a", "type": "choice", "prompt": "question 1.", "choices": {1: "x", "B": "y"}},
        {"id": "b", "type": Unreadable(), "prompt": "question 2."},
        {"id": "c", "type": "math", "prompt": "question 3."},
    ]
    result = contest({"acl": lambda: ScriptedBackend(answer)}).get_results(odd)["result"]["results"]
    assert [entry["id"] for entry in result] == ["a", "b", "c"]
    assert [bool(entry["content"]) for entry in result] == [True, False, True]
    assert "RuntimeError: no such type" in log(tmp_path)


def test_without_a_chat_template_questions_are_plain_text(contest: Make) -> None:
    class Base(ScriptedBackend):
        tokenizer = SimpleNamespace(has_chat_template=False, encode=lambda text: text)

        def encode_chat(self, messages: Any, **variables: Any) -> str:
            raise TokenizerError("the model has no chat template")

    asked = questions(4)
    backend = Base(answer)
    made = contest({"acl": lambda: backend}, system="Be brief.")
    assert all(contents(made.get_results(asked), asked).values())
    assert all(prompt.startswith("Be brief.\n\n") for prompt in backend.asked)


def test_the_budget_is_shared_by_questions_and_what_is_left_goes_on() -> None:
    now = [0.0]
    budget = Budget(1000, 200, lambda: now[0])
    assert budget.start(50) == 250
    now[0] = 100
    assert budget.stop() == 100
    assert budget.start(50) == 100 + 900 * 50 / 150
    now[0] = 200
    budget.stop()
    assert budget.start(100) == 200 + 800
    now[0] = 300
    budget.stop()
    assert budget.start(10) == 300 + 350  # more files than were announced: half of what is left
