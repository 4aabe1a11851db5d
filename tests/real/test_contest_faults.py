"""The real zip of the bundled reasoner under the faults a contest brings: every id has an entry each time.

Kept texts are those of an undisturbed run, the rest are empty, and the log says why.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from models.reasoner import data
from qcompile.cli.main import cli
from qcompile.evaluate.cases import read_cases
from qcompile.package import contest_zip, judge_child
from qcompile.package.check_contest import question_of
from qcompile.package.check_results import check_result
from qcompile.package.contest.settings import SETTINGS_NAME
from qcompile.package.unpack import check_zip, unpack

pytestmark = pytest.mark.real
WEIGHTS = Path(data.__file__).parent / "weights"
# breaks every step in which the question with this id is answered
POISON = """
from qcompile_contest import ladder
_open = ladder.open_rung
def _fragile(path, rung, settings):
    engine = _open(path, rung, settings)
    add, step, poisoned = engine.add_request, engine.step, set()
    def add_request(prompt, params):
        number = add(prompt, params)
        if engine.tokenizer.decode(prompt).find({mark!r}) >= 0:
            poisoned.add(number)
        return number
    def throwing_step():
        deltas = step()
        if poisoned & {{delta.request_id for delta in deltas}}:
            poisoned.clear()
            engine._scheduler.clear()
            raise FloatingPointError("poison")
        return deltas
    engine.add_request, engine.step = add_request, throwing_step
    return engine
ladder.open_rung = _fragile
"""

# a clock by which every step takes 0.3 seconds
CLOCK = """
from qcompile_contest import contest as _contest, ladder
_open, _now, _Contest = ladder.open_rung, [0.0], _contest.Contest
def _ticking(path, rung, settings):
    engine = _open(path, rung, settings)
    step = engine.step
    def ticking_step():
        _now[0] += 0.3
        return step()
    engine.step = ticking_step
    return engine
ladder.open_rung = _ticking
_contest.Contest = lambda root: _Contest(root, lambda: _now[0])
"""


class Package:
    """An unpacked zip and its test file."""

    def __init__(self, root: Path, questions: list[dict[str, Any]]) -> None:
        self.root = root
        self.questions = questions
        self.test = root.parent / "test.json"
        self.test.write_text(json.dumps(questions), encoding="utf-8")
        (root.parent / "answers").mkdir()

    def set(self, **settings: Any) -> None:
        path = self.root / SETTINGS_NAME
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    def patch(self, program: str) -> None:
        """Run a program in competition_model.py before it takes the contest loop."""
        path = self.root / "competition_model.py"
        head, mark, tail = path.read_text().partition("from qcompile_contest.contest")
        path.write_text(head + program + mark + tail)

    def start(self) -> "subprocess.Popen[str]":
        command = [sys.executable, judge_child.__file__, str(self.root.parent / "report.jsonl")]
        command += [str(self.root.parent / "answers"), str(self.root), str(self.test)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def answers(self, process: "subprocess.Popen[str]") -> tuple[dict[str, Any], str]:
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0, printed
        text = (self.root.parent / "answers" / "0.json").read_text(encoding="utf-8")
        results, findings = check_result(text, self.questions, "test.json")
        assert [r["id"] for r in results] == [q["id"] for q in self.questions]
        assert all("answers are empty" in finding.message for finding in findings), findings
        return {result["id"]: result["content"] for result in results}, printed


@pytest.fixture(scope="module")
def zipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zip")
    path = folder / "competition_submission.zip"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contest_zip, "collect_wheels", lambda *_, **__: [])
        for words in (
            ["export", str(WEIGHTS), "-o", str(folder / "model")],
            ["package", str(folder / "model"), "--target", "contest", "-o", str(path), "--batch-size", "8"],
        ):
            done = CliRunner().invoke(cli, words)
            assert done.exit_code == 0, done.output
    return path


@pytest.fixture
def package(zipped: Path, tmp_path: Path) -> Package:
    assert unpack(zipped, check_zip(zipped)[0], tmp_path / "package") == []
    questions = [question_of(case) for case in read_cases(WEIGHTS.parent / "test.jsonl")[0]]
    return Package(tmp_path / "package", [q for q in questions if q["id"][-1] in "05"])


@pytest.fixture(scope="module")
def undisturbed(zipped: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("undisturbed") / "package"
    assert unpack(zipped, check_zip(zipped)[0], root) == []
    questions = [question_of(case) for case in read_cases(WEIGHTS.parent / "test.jsonl")[0]]
    made = Package(root, [q for q in questions if q["id"][-1] in "05"])
    found, _ = made.answers(made.start())
    assert all(found.values())
    return found


def check_kept(found: dict[str, Any], undisturbed: dict[str, Any]) -> list[str]:
    """Kept texts are real; returns the ids that are empty."""
    for one, content in found.items():
        if content:
            whole = undisturbed[one] if isinstance(undisturbed[one], list) else [undisturbed[one]]
            assert (content if isinstance(content, list) else [content]) == whole[
                : len(content) if isinstance(content, list) else 1
            ]
    return [one for one, content in found.items() if not content]


def test_time_is_up(package: Package, undisturbed: dict[str, Any]) -> None:
    package.patch(CLOCK)
    package.set(budget_s=30, expected_questions=len(package.questions))
    found, printed = package.answers(package.start())
    assert 0 < len(check_kept(found, undisturbed)) < len(found)
    assert "have no answer (out of time)" in printed


def test_a_case_that_makes_generation_throw(package: Package, undisturbed: dict[str, Any]) -> None:
    victim = package.questions[3]
    package.patch(POISON.format(mark=victim["prompt"][:40]))
    found, printed = package.answers(package.start())
    assert check_kept(found, undisturbed) == [victim["id"]]
    assert "FloatingPointError: poison" in printed


def test_the_om_is_missing(package: Package, undisturbed: dict[str, Any]) -> None:
    package.set(
        ladder=[
            {"kind": "acl", "path": "model_om"},
            {"kind": "torch_npu", "path": "checkpoint"},
            {"kind": "onnxruntime", "path": "model"},
        ]
    )
    found, printed = package.answers(package.start())
    assert check_kept(found, undisturbed) == []
    assert "the .om model on the NPU (CANN's acl) cannot be used" in printed
    assert "running on ONNX Runtime on the CPU" in printed


def test_the_disk_is_full(package: Package, undisturbed: dict[str, Any]) -> None:
    (package.root / "contest_log").mkdir()
    (package.root / "contest_log" / "run.jsonl").symlink_to("/dev/full")
    found, printed = package.answers(package.start())
    assert check_kept(found, undisturbed) == []
    assert "the log cannot be written (No space left on device)" in printed


def test_sigterm(package: Package, undisturbed: dict[str, Any]) -> None:
    process = package.start()
    log = package.root / "contest_log" / "run.jsonl"
    while not log.exists() or log.read_text().count('"text"') < 5:
        time.sleep(0.05)
        assert process.poll() is None
    os.kill(process.pid, signal.SIGTERM)
    found, printed = package.answers(process)
    assert 0 < len(check_kept(found, undisturbed)) < len(found)
    assert "have no answer (asked to stop)" in printed
