"""Asking: against an engine that answers from a script."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qcompile.errors import EvaluateError
from qcompile.evaluate import Case, checkers, sandbox
from qcompile.evaluate.asking import seed_of
from qcompile.evaluate.evaluate import select_cases
from qcompile.evaluate.scoreboard import scoreboard
from qcompile.evaluate.settings import EvalSettings, token_limits
from qcompile.evaluate.submission import submission
from qcompile.evaluate.templates import Templates
from tests.evaluate.scripted_engine import right_form
from tests.evaluate.scripted_run import SETTINGS, answer, engine_in, records, run, stable, task_of, write

pytestmark = pytest.mark.usefixtures("each_program_once")


class TestAsking:
    def test_everything_is_asked_and_judged(self, tmp_path: Path, data: Path) -> None:
        engine = engine_in(tmp_path)
        done = run(engine, task_of(data))
        assert len(engine.asked) == 3 * 4 + 4 * 3
        assert [result.case.id for result in done.results] == [record["id"] for record in records()]
        assert [result.verdict for result in done.results] == ["right"] * 16
        assert done.problems == []
        assert engine.most_in_flight == 3

    def test_the_submission_has_the_contests_form(self, tmp_path: Path, data: Path) -> None:
        done = run(engine_in(tmp_path), task_of(data))
        made = submission(done.results, 3)
        assert list(made) == ["result"]
        assert list(made["result"]) == ["results"]
        for entry, record in zip(made["result"]["results"], records(), strict=True):
            assert list(entry) == ["id", "content"]
            assert entry["id"] == record["id"]
            contents = entry["content"] if record["type"] == "code-generate" else [entry["content"]]
            assert isinstance(contents, list)
            assert len(contents) == (3 if record["type"] == "code-generate" else 1)
            assert all(re.fullmatch(r"<think>.*</think><answer>.*</answer>", text, re.DOTALL) for text in contents)

    def test_one_sample_is_a_string_and_five_are_cut_to_three(self, tmp_path: Path, data: Path) -> None:
        done = run(engine_in(tmp_path), task_of(data, replace(SETTINGS, samples=1)))
        assert all(isinstance(e["content"], str) for e in submission(done.results, 1)["result"]["results"])
        done = run(engine_in(tmp_path), task_of(data, replace(SETTINGS, samples=5)))
        contents = submission(done.results, 5)["result"]["results"][3]["content"]
        assert contents == [attempt.sample.text for attempt in done.results[3].attempts][:3]

    def test_texts_are_never_touched(self, tmp_path: Path, data: Path) -> None:
        odd = " <think>a</think>\r\n<answer>Answer: \u2028B </answer>\n\n"
        done = run(engine_in(tmp_path, answer=lambda *_: odd), task_of(data))
        assert {
            e["content"] for e in submission(done.results, 1)["result"]["results"] if isinstance(e["content"], str)
        } == {odd}
        assert not any(attempt.is_format_ok for attempt in done.attempts)

    def test_how_each_text_is_drawn(self, tmp_path: Path, data: Path) -> None:
        engine = engine_in(tmp_path)
        limits = token_limits(("500", "code-generate=900", "math=70"), 1)
        run(engine, task_of(data, EvalSettings(limits, samples=3, seed=5)))
        for prompt, params in engine.asked:
            assert params.stop == ("</answer>",)
            assert params.include_stop
            kind = "code-generate" if "Python" in prompt else "math" if "box" in prompt else "choice"
            assert params.max_new_tokens == {"code-generate": 900, "math": 70, "choice": 500}[kind]
        drawn = [params for _, params in engine.asked if params.temperature > 0]
        assert {(params.temperature, params.top_p) for params in drawn} == {(0.8, 0.95)}
        assert sorted(params.seed for params in drawn) == sorted(
            seed_of(5, f"p{n}", s) for n in range(4) for s in (1, 2)
        )

    def test_a_temperature_draws_every_text(self, tmp_path: Path, data: Path) -> None:
        engine = engine_in(tmp_path)
        run(engine, task_of(data, replace(SETTINGS, temperature=0.5)))
        assert {params.temperature for _, params in engine.asked} == {0.5}
        assert len({params.seed for _, params in engine.asked}) == len(engine.asked)

    def test_neither_batch_nor_order_changes_a_text(self, tmp_path: Path, data: Path) -> None:
        boards = []
        for batch_size in (1, 2, 7, 100):
            folder = tmp_path / str(batch_size)
            folder.mkdir()
            board = stable(run(engine_in(folder), task_of(write(folder / "cases.jsonl", records())), batch_size))
            for entry in ("model", "data"):
                board[entry].pop("path")
            boards.append(board)
        assert boards[1:] == boards[:-1]

    def test_without_a_chat_template_the_text_goes_in_plain(self, tmp_path: Path, data: Path) -> None:
        engine = engine_in(tmp_path, has_chat_template=False)
        done = run(engine, task_of(data, templates=replace(Templates.load(), system="Be brief.")))
        assert engine.asked[0][0].startswith("Be brief.\n\nq0.\nA. 0\nB. 1\n\nThink step by step")
        assert done.notes == ["no chat template (a base model): prompts are used as they are"]
        engine = engine_in(tmp_path)
        raw = run(engine, task_of(data, replace(SETTINGS, is_raw=True)))
        assert engine.asked[0][0].startswith("q0.")
        assert raw.notes == []

    @pytest.mark.parametrize("is_raw", [False, True])
    def test_template_arguments_without_a_template_are_said(self, tmp_path: Path, data: Path, is_raw: bool) -> None:
        engine = engine_in(tmp_path, has_chat_template=is_raw)
        done = run(engine, task_of(data, replace(SETTINGS, is_raw=is_raw, template_arguments={"think": False})))
        assert done.notes[-1] == "the prompts do not go through a chat template: --template-arg changes nothing"

    def test_template_arguments_reach_the_template(self, tmp_path: Path, data: Path) -> None:
        engine = engine_in(tmp_path)
        run(engine, task_of(data, replace(SETTINGS, template_arguments={"enable_thinking": False})))
        assert json.loads(engine.asked[0][0])["enable_thinking"] is False

    def test_cases_are_chosen_by_type_and_number(self) -> None:
        cases = [Case(str(n), kind, "?") for n, kind in enumerate(["math", "choice", "math", "math", "choice"])]
        assert [c.id for c in select_cases(cases, [], None)] == ["0", "1", "2", "3", "4"]
        assert [c.id for c in select_cases(cases, ["math"], None)] == ["0", "2", "3"]
        assert [c.id for c in select_cases(cases, [], 1)] == ["0", "1"]
        assert [c.id for c in select_cases(cases, ["math", "choice"], 2)] == ["0", "1", "2", "4"]


class TestFailures:
    def test_a_text_that_fails_is_reported_and_tried_again(self, tmp_path: Path, data: Path) -> None:
        done = run(engine_in(tmp_path, fail="q2."), task_of(data))
        assert [r.case.id for r in done.results if r.verdict == "error"] == ["c2", "m2", "g2", "p2"]
        assert [str(p) for p in done.problems] == [
            f"line {line}: case '{name}2' was not answered: no memory for a KV cache"
            for line, name in ((9, "c"), (10, "m"), (11, "g"), (12, "p"))
        ]
        assert submission(done.results, 3)["result"]["results"][8] == {"id": "c2", "content": ""}
        assert submission(done.results, 3)["result"]["results"][11] == {"id": "p2", "content": [""]}
        board = scoreboard(done)
        assert board["score"]["accuracy"]["count"] == board["score"]["format"]["count"] == 12
        assert board["score"]["accuracy"]["total"] == board["score"]["format"]["total"] == 16
        assert board["by_type"]["code-generate"]["pass_at"]["3"]["count"] == 3
        engine = engine_in(tmp_path)
        assert run(engine, task_of(data)).problems == []
        assert {prompt for prompt, _ in engine.asked} == {p for p, _ in engine.asked if "q2." in p}

    def test_a_prompt_that_does_not_fit(self, tmp_path: Path, data: Path) -> None:
        write(data, [*records(1), {"id": "long", "type": "math", "prompt": "q9. " + "x" * 5000, "answer": 9}])
        done = run(engine_in(tmp_path, max_chars=3000), task_of(data))
        assert [r.verdict for r in done.results] == ["right"] * 4 + ["error"]
        assert re.fullmatch(
            r"line 5: case 'long' was not answered: prompt 1 has \d+ tokens, the context holds 3000; shorten it",
            str(done.problems[0]),
        )

    def test_a_chat_template_that_raises(self, tmp_path: Path, data: Path) -> None:
        write(data, [{"id": "t", "type": "math", "prompt": "q1. template-raises"}, *records(1)])
        done = run(engine_in(tmp_path), task_of(data))
        assert str(done.problems[0]) == "line 1: case 't' was not answered: the template raised: no"
        assert [r.verdict for r in done.results] == ["error"] + ["right"] * 4

    def test_code_that_had_to_be_stopped(self, tmp_path: Path, data: Path) -> None:
        def flooding(prompt: str, params: Any) -> str:
            loud = "print('x' * 10_000_000)"
            return right_form(f"\n```python\n{loud}\n```\n") if "Python" in prompt else answer(prompt, params)

        hanging = {"id": "h", "type": "code-generate", "prompt": "q1.", "tests": ["while True: pass"]}
        write(data, [hanging, *records(1)])
        settings = replace(SETTINGS, samples=1, limits=replace(SETTINGS.limits, wall_s=1.5, cpu_s=1))
        done = run(engine_in(tmp_path), task_of(data, settings))
        assert re.fullmatch(
            r"line 1: case 'h': the code (ran longer than 1.5 s|used up its CPU time)", str(done.problems[0])
        )
        assert [r.verdict for r in done.results] == ["wrong"] + ["right"] * 4
        (tmp_path / "model" / "qcompile.json").write_text('{"another": "model"}')
        done = run(engine_in(tmp_path, answer=flooding), task_of(data, settings))
        assert [str(p) for p in done.problems] == [
            f"line {line}: case '{name}': the code printed more than 262144 bytes"
            for line, name in ((1, "h"), (5, "p0"))
        ]

    def test_unknown_answers_count_in_format_only(self, tmp_path: Path, data: Path) -> None:
        blind = [{k: v for k, v in record.items() if k not in ("answer", "tests")} for record in records(1)]
        board = scoreboard(run(engine_in(tmp_path), task_of(write(data, [*blind, *records(2)[4:]]))))
        assert board["score"]["format"]["total"] == 8
        assert board["score"]["accuracy"] == board["score"]["accuracy"] | {"count": 4, "total": 4, "share": 1.0}
        assert [case["verdict"] for case in board["cases"]][:4] == ["unknown"] * 4

    def test_math_verify_is_missed_before_anything_is_asked(
        self, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        engine = engine_in(tmp_path)
        with pytest.raises(EvaluateError, match=r"pip install '\.\[eval\]'"):
            run(engine, task_of(data))
        assert engine.asked == []

    def test_a_missing_layer_is_noted(self, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def weak(code: str, tests: Any, limits: Any) -> Any:
            return sandbox.run_code(code, tests, limits, without=("seccomp", "landlock"))

        monkeypatch.setattr(checkers, "run_code", weak)
        notes = run(engine_in(tmp_path), task_of(data)).notes
        assert len(notes) == 1
        assert re.fullmatch(r"code was run without .*seccomp.*: the sandbox had only .*rlimits\+audit hook", notes[0])


class TestSettings:
    @pytest.mark.parametrize("entry", ["0", "-1", "x", "math=", "math=0", "maths=5", "=5", "1.5", "99999999999", "٣"])
    def test_limits_that_are_none(self, entry: str) -> None:
        with pytest.raises(EvaluateError, match=re.escape(f"--max-new-tokens {entry}")):
            token_limits((entry,), 1)

    def test_seeds_differ(self) -> None:
        seeds = {seed_of(seed, name, sample) for seed in range(5) for name in ("a", "b", "1\0a") for sample in range(5)}
        assert len(seeds) == 5 * 3 * 5
        assert all(0 <= seed < 1 << 63 for seed in seeds)
        assert seed_of(0, "a", 0) == 7588792172602473380
