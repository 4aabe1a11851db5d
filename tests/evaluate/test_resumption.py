"""The journal: what is finished is never run again, and what does not belong together never mixes."""

import json
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from qcompile.errors import EvaluateError
from qcompile.evaluate import Case, judging, sandbox
from qcompile.evaluate.checkers import Verdict
from qcompile.evaluate.evaluate import evaluate, identity
from qcompile.evaluate.journal import Journal, journal_path, other_runs
from qcompile.evaluate.sample import Sample
from qcompile.evaluate.scoreboard import Run, scoreboard
from qcompile.evaluate.settings import token_limits
from qcompile.evaluate.templates import Templates
from tests.evaluate.scripted_run import SETTINGS, engine_in, records, run, stable, task_of, write

if TYPE_CHECKING:
    from qcompile.runtime import Engine

pytestmark = pytest.mark.usefixtures("each_program_once")


class TestResumption:
    @pytest.mark.parametrize("after", [1, 4, 11, 23])
    def test_ctrl_c_loses_nothing_finished(self, tmp_path: Path, data: Path, after: int) -> None:
        (tmp_path / "whole").mkdir()
        whole = stable(run(engine_in(tmp_path), task_of(write(tmp_path / "whole" / data.name, records()))))
        first = engine_in(tmp_path, interrupt_after=after)
        with pytest.raises(KeyboardInterrupt):
            run(first, task_of(data))
        second = engine_in(tmp_path)
        resumed = stable(run(second, task_of(data)))
        with Journal(tmp_path / "results.json", identity(tmp_path / "model", SETTINGS)) as journal:
            assert len(journal.samples) == 24
        assert len(second.asked) <= 24 - after
        assert len(set(map(str, first.asked)) & set(map(str, second.asked))) <= 3  # only what was in flight
        for board in (whole, resumed):
            del board["data"]["path"]
        assert resumed == whole

    def test_a_finished_run_asks_nothing(self, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = scoreboard(run(engine_in(tmp_path), task_of(data)))
        engine = engine_in(tmp_path)
        monkeypatch.setattr("qcompile.evaluate.judging.check_answer", None)
        assert scoreboard(run(engine, task_of(data))) == before
        assert engine.asked == []

    def test_a_quota_of_two_cores_on_a_large_machine_judges_two_at_a_time(
        self, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now, most = [0], [0]

        def check(*_: object) -> Verdict:
            now[0] += 1
            most[0] = max(most[0], now[0])
            time.sleep(0.01)
            now[0] -= 1
            return Verdict(True, "")

        monkeypatch.setattr(os, "cpu_count", lambda: 64)
        monkeypatch.setattr(judging, "default_threads", lambda: 2)
        monkeypatch.setattr(judging, "check_answer", check)
        run(engine_in(tmp_path), task_of(data))
        assert most == [2]

    def test_other_rules_of_the_checkers_judge_again(
        self, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = scoreboard(run(engine_in(tmp_path), task_of(data)))
        monkeypatch.setattr(judging, "_RULES", judging._RULES + 1)
        monkeypatch.setattr(judging, "check_answer", lambda *_: Verdict(False, "", "other rules"))
        engine = engine_in(tmp_path)
        after = scoreboard(run(engine, task_of(data)))
        assert engine.asked == []
        assert before != after

    def test_an_interruption_waits_for_no_program(
        self, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pressed: list[str] = []

        def sleeping(case: Case, *_: object) -> Verdict:
            if case.type == "code-generate":
                if not pressed:
                    pressed.append(case.id)
                    os.kill(os.getpid(), signal.SIGINT)
                sandbox.run_code("import time; time.sleep(60)", [], sandbox.Limits(wall_s=60.0))
            return Verdict(True, "")

        monkeypatch.setattr(judging, "check_answer", sleeping)
        monkeypatch.setattr(judging, "stop_running", lambda: (time.sleep(1), sandbox.stop_running()))
        monkeypatch.setattr(judging, "default_threads", lambda: 1)
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            run(engine_in(tmp_path), task_of(write(tmp_path / "one.jsonl", records(1))))
        assert time.monotonic() - started < 30
        with Journal(tmp_path / "results.json", identity(tmp_path / "model", SETTINGS)) as journal:
            assert all(judgement.is_correct for judgement in journal.judgements.values())

    def test_an_interruption_while_judging(self, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[str] = []
        original = judging.check_answer

        def pressing(case: Case, text: str, limits: Any) -> Any:
            seen.append(case.id)
            if len(seen) == 6:
                os.kill(os.getpid(), signal.SIGINT)
            return original(case, text, limits)

        monkeypatch.setattr(judging, "check_answer", pressing)
        with pytest.raises(KeyboardInterrupt):
            run(engine_in(tmp_path), task_of(data))
        engine = engine_in(tmp_path)
        done = run(engine, task_of(data))
        assert engine.asked == []
        assert [r.verdict for r in done.results] == ["right"] * 16

    def test_a_torn_line_is_dropped(self, tmp_path: Path, data: Path) -> None:
        before = stable(run(engine_in(tmp_path), task_of(data)))
        path = journal_path(tmp_path / "results.json", identity(tmp_path / "model", SETTINGS))
        lines = [line for line in path.read_bytes().splitlines(keepends=True) if b'"kind": "sample"' in line]
        header = path.read_bytes().splitlines(keepends=True)[0]
        path.write_bytes(header + b"".join(lines[:10]) + lines[10][:40])
        engine = engine_in(tmp_path)
        done = run(engine, task_of(data))
        assert len(engine.asked) == 24 - 10
        assert done.notes == ["1 damaged lines of the journal were dropped; what they held was run again"]
        done.notes.clear()
        assert stable(done) == before
        assert all(json.loads(line) for line in path.read_bytes().splitlines())

    @pytest.mark.parametrize(
        "junk",
        [b"{}\n", b"[]\n", b"\xff\xfe\n", b'{"kind": "sample", "key": "x"}\n', b"[" * 9000 + b"\n", b"null\n", b"\n"],
    )
    def test_a_damaged_line_costs_only_itself(self, tmp_path: Path, data: Path, junk: bytes) -> None:
        run(engine_in(tmp_path), task_of(data))
        path = journal_path(tmp_path / "results.json", identity(tmp_path / "model", SETTINGS))
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(lines[0] + junk + b"".join(lines[1:]))
        engine = engine_in(tmp_path)
        done = run(engine, task_of(data))
        assert engine.asked == []
        assert done.notes == ["1 damaged lines of the journal were dropped; what they held was run again"]

    def test_records_are_on_disk_at_once(self, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        synced: list[int] = []
        monkeypatch.setattr("os.fsync", synced.append)
        run(engine_in(tmp_path), task_of(data))
        assert len(synced) == 1 + 24 + 24

    @pytest.mark.parametrize(
        ("change", "what"),
        [
            ({"seed": 1}, "settings.seed 0 → 1"),
            ({"temperature": 0.7}, "settings.temperature 0.0 → 0.7"),
            ({"max_new_tokens": token_limits(("7",), 1)}, "settings.max_new_tokens.math 1024 → 7"),
            ({"is_raw": True}, "settings.raw False → True"),
            ({"max_model_len": 5}, "settings.max_model_len None → 5"),
            ({"template_arguments": {"think": False}}, "settings.template_arguments.think not set → False"),
        ],
    )
    def test_other_settings_never_mix(self, tmp_path: Path, data: Path, change: dict[str, Any], what: str) -> None:
        run(engine_in(tmp_path), task_of(data))
        changed = replace(SETTINGS, **change)
        who = identity(tmp_path / "model", changed)
        assert not journal_path(tmp_path / "results.json", who).exists()
        ((_, differences),) = other_runs(tmp_path / "results.json", who)
        assert what in differences
        engine = engine_in(tmp_path)
        run(engine, task_of(data, changed))
        assert len(engine.asked) == 24
        engine = engine_in(tmp_path)
        run(engine, task_of(data))  # and back again
        assert engine.asked == []

    def test_a_setting_that_is_gone_is_said(self, tmp_path: Path, data: Path) -> None:
        old = replace(SETTINGS, template_arguments={"tools": ["a" * 20 + "b"], "think": False})
        run(engine_in(tmp_path), task_of(data, old))
        for arguments, wanted in (
            ({"tools": ["a" * 20 + "b"]}, ["settings.template_arguments.think False → not set"]),
            (
                {"tools": ["a" * 20 + "c"], "think": False},
                [f"settings.template_arguments.tools ['{'a' * 14} → ['{'a' * 14}"],
            ),
        ):
            who = identity(tmp_path / "model", replace(SETTINGS, template_arguments=arguments))
            ((_, differences),) = other_runs(tmp_path / "results.json", who)
            assert differences == wanted

    def test_another_model_never_mixes(self, tmp_path: Path, data: Path) -> None:
        run(engine_in(tmp_path), task_of(data))
        (tmp_path / "model" / "qcompile.json").write_text('{"weights": "new"}')
        engine = engine_in(tmp_path)
        run(engine, task_of(data))
        assert len(engine.asked) == 24

    def test_more_samples_keep_the_old_ones(self, tmp_path: Path, data: Path) -> None:
        run(engine_in(tmp_path), task_of(data, replace(SETTINGS, samples=1)))
        engine = engine_in(tmp_path)
        run(engine, task_of(data, replace(SETTINGS, samples=3)))
        assert len(engine.asked) == 4 * 2

    def test_a_changed_answer_is_judged_again_but_not_asked(self, tmp_path: Path, data: Path) -> None:
        run(engine_in(tmp_path), task_of(data))
        changed = records()
        changed[1]["answer"] = 99
        changed[3]["tests"] = ["assert f(1) == 99"]
        engine = engine_in(tmp_path)
        done = run(engine, task_of(write(data, changed)))
        assert engine.asked == []
        assert [r.case.id for r in done.results if r.verdict == "wrong"] == ["m0", "p0"]

    def test_a_changed_prompt_is_asked_again(self, tmp_path: Path, data: Path) -> None:
        run(engine_in(tmp_path), task_of(data))
        changed = records()
        changed[1]["prompt"] = "q3. Really?"
        changed[4]["choices"] = {"A": "7", "B": "8"}
        engine = engine_in(tmp_path)
        run(engine, task_of(write(data, changed[::-1])))
        assert len(engine.asked) == 2

    def test_other_templates_ask_again(self, tmp_path: Path, data: Path) -> None:
        run(engine_in(tmp_path), task_of(data))
        own = tmp_path / "own.toml"
        own.write_text("[math]\nen = '{prompt} Put it into a box.'\n")
        engine = engine_in(tmp_path)
        run(engine, task_of(data, templates=Templates.load(own)))
        assert sorted(re.findall(r"q\d\. [^\"]*", prompt)[0] for prompt, _ in engine.asked) == [
            f"q{n}. Put it into a box." for n in range(4)
        ]

    def test_two_runs_with_other_settings_cannot_write_one_output(self, tmp_path: Path, data: Path) -> None:
        other = replace(SETTINGS, seed=SETTINGS.seed + 1)
        engine = engine_in(tmp_path)
        with (
            Journal(tmp_path / "results.json", identity(tmp_path / "model", other)) as journal,
            pytest.raises(
                EvaluateError, match=r"results\.json: another qcompile eval, with another model or other set"
            ),
        ):
            run(engine, task_of(data))
        assert [path for path in tmp_path.glob("*.jsonl") if "journal" in path.name] == [journal.path]
        run(engine, task_of(data))

    def test_what_is_written_is_written_before_another_run_can_begin(self, tmp_path: Path, data: Path) -> None:
        def write(_: Run) -> None:
            with pytest.raises(EvaluateError, match="another qcompile eval is writing it"):
                Journal(tmp_path / "results.json", identity(tmp_path / "model", SETTINGS))
            written.append(True)

        written: list[bool] = []
        evaluate(cast("Engine", engine_in(tmp_path)), task_of(data), 4, write=write)
        assert written

    def test_two_runs_cannot_write_one_journal(self, tmp_path: Path, data: Path) -> None:
        engine_in(tmp_path)
        with (
            Journal(tmp_path / "results.json", identity(tmp_path / "model", SETTINGS)),
            pytest.raises(EvaluateError, match="another qcompile eval is writing it"),
        ):
            run(engine_in(tmp_path), task_of(data))

    def test_a_full_disk(self, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(EvaluateError, match=r"cannot be written: No space left.*run again to go on"):
            run(engine_in(tmp_path), task_of(data))

    def test_a_missing_folder(self, tmp_path: Path, data: Path) -> None:
        with pytest.raises(EvaluateError, match="cannot be written"):
            run(engine_in(tmp_path), replace(task_of(data), output=tmp_path / "no" / "results.json"))

    def test_seconds_add_up_over_sessions(self, tmp_path: Path) -> None:
        sample = Sample("x", "stop", 3, 10, 0.1, 0.2)
        for key, seconds in (("a", 2.0), ("b", 3.0)):
            with Journal(tmp_path / "r.json", {"model": "m", "settings": {}}) as journal:
                journal.add_sample(f"{key}1", sample, seconds / 2)
                journal.add_sample(f"{key}2", sample, seconds)
        with Journal(tmp_path / "r.json", {"model": "m", "settings": {}}) as journal:
            assert (journal.generated.tokens, journal.generated.seconds) == (40, 5.0)
