"""The board's arithmetic, and the command on a package without a model and on a compiled one."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from models.reasoner import data
from qcompile.cli.main import cli
from qcompile.evaluate.cases import Case
from qcompile.package import steps as steps_module
from qcompile.package.board import Board, write_page
from qcompile.package.check_contest import CheckRequest, check_contest
from qcompile.package.judging import Judged, score_of
from qcompile.package.matrix import Cell
from qcompile.package.steps import BASELINE, UNFUSED, Step, choose_cases, measure_steps
from tests.package.made_packages import make_package, make_zip

CASES = Path(data.__file__).parent / "test.jsonl"


def share(value: float) -> dict[str, Any]:
    return {"count": value * 10, "total": 10, "share": value}


def score(speed: float) -> dict[str, Any]:
    everything = {
        "cases": 10,
        "answered": 10,
        "format": share(0.9),
        "accuracy": share(0.5),
        "accuracy_first_text": share(0.4),
    }
    speeds = {"tokens": 1000, "seconds": 10.0, "tokens_per_s": speed, "duration_ms": None}
    return {"all": everything, "by_type": {"math": everything}, "speed": speeds}


def board(speed: float, baseline: float | None, best: float | None, steps: list[Step] | None = None) -> Board:
    made = Board("zip", score(speed), steps or [])
    made.name_ends(baseline, best)
    return made


@pytest.mark.parametrize(
    ("speed", "baseline", "best", "performance", "total"),
    [
        (300, 100, 500, 50.0, 0.4 * 50 + 0.4 * 50 + 0.2 * 90),
        (100, 100, 500, 0.0, 20 + 0 + 18),
        (99, 100, 500, 0.0, 38),
        (500, 100, 500, 100.0, 78),
        (900, 100, 500, 100.0, 78),
        (900, 100, 50, 100.0, 78),
    ],
)
def test_performance_is_normalized_between_baseline_and_best(
    speed: float, baseline: float, best: float, performance: float, total: float
) -> None:
    points = board(speed, baseline, best).points
    assert points == {"accuracy": 50.0, "performance": performance, "format": 90.0, "total": pytest.approx(total)}


def test_the_ends_are_measured_when_none_is_named() -> None:
    steps = [
        Step(BASELINE, 1, 10.0),
        Step(UNFUSED, 1, 20.0),
        Step("fused", 1, 80.0),
        Step("broken", 1, None, reason="x"),
    ]
    made = board(60, None, None, steps)
    assert made.baseline == (BASELINE, 10.0)
    assert made.best == ("fused, the best of this run", 80.0)
    assert made.points["performance"] == pytest.approx(100 * 50 / 70, abs=0.01)
    assert board(60, None, None, [Step(BASELINE, 1, None), Step(UNFUSED, 1, 20.0)]).baseline == (UNFUSED, 20.0)


def test_without_a_baseline_there_is_no_total() -> None:
    points = board(60, None, None).points
    assert points["performance"] is None
    assert points["total"] is None
    assert points["accuracy"] == 50.0


def test_the_page_has_the_steps_and_the_matrix(tmp_path: Path) -> None:
    made = board(60, 5, None, [Step(BASELINE, 1, 10.0), Step("fused <b>", 1, 25.0)])
    made.cells = [Cell(1, 32, 16, 30.0, 500, 60), Cell(8, 32, 16, None, reason="too long")]
    write_page(made, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "x2.50" in page
    assert "fused &lt;b&gt;" in page
    assert "too long" in page
    assert "<script" not in page


def test_cases_of_all_types_in_turn() -> None:
    cases = [Case(f"{kind}{i}", kind, "p") for kind in ("math", "choice") for i in range(3)]
    assert [case.id for case in choose_cases(cases, 4)] == ["choice0", "math0", "choice1", "math1"]


def test_a_package_without_a_model(tmp_path: Path) -> None:
    root = make_package(tmp_path / "root", is_bare=True)
    zipped = make_zip(root, tmp_path / "competition_submission.zip")
    (tmp_path / "c.jsonl").write_text(
        '{"id": "1", "type": "choice", "prompt": "p", "choices": {"A": "x", "B": "y"}, "answer": "A"}\n'
        '{"id": "2", "type": "generic-generate", "prompt": "p", "answer": "y"}\n'
    )
    ends = ("--baseline", "0", "--best", "1000000000")
    record = judge(str(zipped), "--cases", str(tmp_path / "c.jsonl"), *ends, "--threads", "1")
    assert any("--threads: not for the answers" in note for note in record["notes"])
    assert record["score"]["all"]["format"]["count"] == 2
    assert record["score"]["all"]["accuracy"]["count"] == 1
    assert record["points"]["accuracy"] == 50.0
    assert record["points"]["total"] == pytest.approx(0.4 * 50 + 0.4 * record["points"]["performance"] + 20, abs=0.01)
    assert any("tokens are counted as words" in note for note in record["notes"])


def test_lines_that_are_no_cases_are_told(tmp_path: Path) -> None:
    root = make_package(tmp_path / "root", is_bare=True)
    cases = tmp_path / "c.jsonl"
    cases.write_text(
        '{"id": "1", "type": "math", "prompt": "p", "answer": "1"}\n{"id": "2"\n{"id": "3", "type": "x"}\n'
    )
    record = judge(str(root), "--cases", str(cases))
    assert record["score"]["all"]["cases"] == 1
    told = [note for note in record["notes"] if "left out" in note]
    assert [note.partition(": ")[2][:8] for note in told] == ["line 2: ", "line 3: "]
    report = check_contest(CheckRequest(root, cases=[cases], is_offline=True))
    assert [note for note in report.notes if "left out" in note] == told
    cases.write_text("nothing\n" * 30)
    result = CliRunner().invoke(cli, ["judge", str(root), "--cases", str(cases)])
    assert result.exit_code == 1
    assert "not one line is a case; line 1: not JSON" in result.stderr


def test_the_score_outlives_what_cannot_be_measured_beside_it(tmp_path: Path) -> None:
    root = make_package(tmp_path / "root", is_bare=True)
    (tmp_path / "checkpoint").mkdir()
    cases = tmp_path / "c.jsonl"
    cases.write_text('{"id": "1", "type": "math", "prompt": "p", "answer": "1"}\n')
    words = ["judge", str(root), "--cases", str(cases), "--matrix", "--checkpoint", str(tmp_path / "checkpoint")]
    result = CliRunner().invoke(cli, [*words, "-o", str(tmp_path / "board.json")])
    assert result.exit_code == 1
    record = json.loads((tmp_path / "board.json").read_text())
    assert record["score"]["all"]["accuracy"]["count"] == 1
    assert ["config.json" in record["findings"][0], "holds no compiled model" in record["findings"][1]] == [True, True]


def test_a_package_that_fails_says_why(tmp_path: Path) -> None:
    root = make_package(tmp_path / "root", is_bare=True)
    (root / "competition_model.py").write_text("import nothing_of_this_name\n")
    result = CliRunner().invoke(cli, ["judge", str(root), "--cases", str(CASES)])
    assert result.exit_code == 1
    assert "nothing_of_this_name" in result.stdout
    assert "dependencies/" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nowhere.zip", "--matrix"], 1, "there is no such file"),
        (["EMPTY", "--matrix"], 1, "holds no compiled model"),
        (["EMPTY", "--cases", str(CASES)], 1, "no competition_model.py"),
        (["EMPTY"], 2, "--cases"),
        (["EMPTY", "--matrix", "--concurrency", "1,x"], 2, "numbers from 1"),
        (["EMPTY", "--cases", str(CASES), "--cases", str(CASES)], 1, "stands in two case files"),
        (["EMPTY", "--cases", str(CASES), "--checkpoint", "nowhere"], 1, "takes a Hugging Face directory"),
        (["EMPTY", "--cases", str(CASES), "--step-cases", "5"], 2, "--step-cases is for --checkpoint"),
        (["EMPTY", "--cases", str(CASES), "--concurrency", "5"], 2, "--concurrency is for --matrix"),
        (["EMPTY", "--cases", str(CASES), "--baseline", "5", "--best", "5"], 2, "must be above --baseline 5"),
        (["EMPTY", "--cases", str(CASES), "-o", "x.json", "--html", "./x.json"], 2, "both name x.json"),
    ],
)
def test_bad_input(tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    result = CliRunner().invoke(cli, ["judge", *(str(tmp_path) if word == "EMPTY" else word for word in arguments)])
    assert result.exit_code == code
    assert said in result.stderr


def test_a_compiled_model_has_no_wheels_for_a_clean_room(tmp_path: Path) -> None:
    (tmp_path / "qcompile.json").write_text("{}")
    result = CliRunner().invoke(cli, ["judge", str(tmp_path), "--cases", str(CASES), "--clean"])
    assert result.exit_code == 1
    assert "`qcompile package` it first" in result.stderr


def judge(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(cli, ["judge", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    record: dict[str, Any] = json.loads(result.stdout)
    return record


def test_every_step_answers_the_same_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[dict[str, Any]] = []

    def run(module: str, job: dict[str, Any]) -> dict[str, Any]:
        jobs.append(job)
        texts = ["a", "b"] if job["kind"] == "transformers" else ["a", "c"]
        return (
            {"error": "no torch"} if len(jobs) == 3 else {"texts": texts, "tokens": 20, "seconds": 2.0, "load_s": 1.0}
        )

    monkeypatch.setattr(steps_module, "run_in_process", run)
    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(steps_module, "_qcompile", lambda *arguments: commands.append(arguments))
    from qcompile.evaluate.templates import Templates

    cases = [Case("1", "math", "1 + 1"), Case("2", "math", "2 + 2")]
    found = measure_steps(tmp_path, cases, Templates.load(), max_new_tokens=8, batch_size=4, threads=1)
    assert [(step.tokens_per_s, step.same_texts) for step in found] == [
        (10.0, 2),
        (10.0, 1),
        (None, 0),
        (10.0, 1),
        (10.0, 1),
    ]
    assert found[2].reason == "no torch"
    assert [job["batch_size"] for job in jobs] == [1, 1, 1, 1, 4]
    assert len({json.dumps(job["conversations"]) for job in jobs}) == 1
    assert [command[0] for command in commands] == ["export", "optimize", "optimize"]


def test_times_of_the_simulated_device_are_nobodys() -> None:
    judged = Judged([], num_tokens=50, file_seconds=[2.0], construct_s=1.0, durations_ms={"a": 3.0})
    assert score_of(judged)["speed"]["tokens_per_s"] == 25.0
    judged.simulated = ("Ascend910B4", "8.1")
    speed = score_of(judged)["speed"]
    assert speed.pop("tokens") == 50
    assert set(speed.values()) == {None}
    made = Board("zip", score_of(judged))
    made.name_ends(1.0, 100.0)
    assert made.points["performance"] is None
