"""`qcompile eval` as a user runs it, on a tiny real model with random weights."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from qcompile.cli.main import cli
from qcompile.evaluate.journal import Journal
from qcompile.runtime import Engine, SamplingParams
from qcompile.runtime.manifest import sha256_of
from tests.runtime.toy_compiler import compile_tiny

CASES = [
    {"id": "c", "type": "choice", "prompt": "Which?", "choices": {"A": "1", "B": "2"}, "answer": "A"},
    {"id": "m", "type": "math", "prompt": "1 + 1?", "answer": 2},
    {"id": "g", "type": "generic-generate", "prompt": "法国的首都？", "answer": "巴黎"},
    {"id": "p", "type": "code-generate", "prompt": "Write f.", "tests": ["assert f() == 1"]},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_tiny(tmp_path_factory.mktemp("model"), seed=3)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "cases.jsonl", CASES)


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def run(model: Path, data: Path, *options: object) -> Result:
    arguments = ["eval", str(model), str(data), "--max-new-tokens", "12", "--threads", "1", *map(str, options)]
    return CliRunner().invoke(cli, arguments)


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_everything_is_written(model: Path, data: Path, tmp_path: Path) -> None:
    result = run(model, data, "-o", "results.json", "--html", "page.html")
    assert result.exit_code == 0, result.output
    entries = load(tmp_path / "results.json")["result"]["results"]
    assert [entry["id"] for entry in entries] == ["c", "m", "g", "p"]
    assert len(entries[3]["content"]) == 3
    board = load(tmp_path / "results.scoreboard.json")
    assert [case["texts"][0]["text"] for case in board["cases"][:3]] == [entry["content"] for entry in entries[:3]]
    assert board["model"]["manifest_sha256"] == sha256_of(model / "qcompile.json")
    assert board["data"]["sha256"] == sha256_of(data)
    assert "<details" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "code-generate" in result.stdout
    assert sorted(p.name.partition(".journal")[0] for p in tmp_path.iterdir()) == [
        "cases.jsonl", "page.html", "results", "results.json", "results.scoreboard.json",
    ]  # fmt: skip
    again = run(model, data, "-o", "results.json")
    assert again.exit_code == 0
    assert "going on with" in again.stderr
    assert load(tmp_path / "results.json")["result"]["results"] == entries


def test_the_texts_are_the_engines(model: Path, data: Path, tmp_path: Path) -> None:
    run(model, data, "-o", "results.json", "--samples", 1)
    board = load(tmp_path / "results.scoreboard.json")
    with Engine(model, threads=1) as engine:
        conversations = [[{"role": "user", "content": case["asked"]}] for case in board["cases"]]
        wanted = engine.chat(conversations, SamplingParams(max_new_tokens=12))
    assert [case["texts"][0]["text"] for case in board["cases"]] == [completion.text for completion in wanted]
    assert [case["texts"][0]["num_new_tokens"] for case in board["cases"]] == [len(c.token_ids) for c in wanted]


def test_json_is_the_scoreboard_without_the_cases(model: Path, data: Path, tmp_path: Path) -> None:
    result = run(model, data, "--json")
    assert result.exit_code == 0
    record = json.loads(result.stdout)
    board = load(tmp_path / f"{model.name}-cases.scoreboard.json")  # the default name
    del board["cases"]
    assert record == board
    assert record["settings"]["max_new_tokens"]["math"] == 12
    assert record["score"]["cut_off"]["share"] > 0


@pytest.mark.parametrize("batch_sizes", [(1, 4, 32)])
def test_seed_and_batch(model: Path, data: Path, tmp_path: Path, batch_sizes: tuple[int, ...]) -> None:
    def texts(name: str, *options: object) -> list[Any]:
        assert run(model, data, "-o", name, "--temperature", 1.5, *options).exit_code == 0
        return [entry["content"] for entry in load(tmp_path / name)["result"]["results"]]

    first = texts("a.json", "--batch-size", 1)
    assert [texts(f"b{size}.json", "--batch-size", size) for size in batch_sizes[1:]] == [first] * 2
    assert texts("c.json", "--seed", 1) != first


def test_bad_lines_are_reported_and_the_rest_runs(model: Path, tmp_path: Path) -> None:
    lines = [
        json.dumps(CASES[0]).encode(),
        b"{not json",
        b"\xff\xfe",
        json.dumps({**CASES[1], "id": None}).encode(),
        json.dumps({**CASES[1], "type": "essay"}).encode(),
        json.dumps({**CASES[1], "id": "c"}).encode(),
        json.dumps({**CASES[1], "id": "long", "prompt": "word " * 3000}).encode(),
        json.dumps(CASES[1]).encode(),
    ]
    (tmp_path / "cases.jsonl").write_bytes(b"\n".join(lines))
    result = run(model, tmp_path / "cases.jsonl", "-o", "results.json")
    assert result.exit_code == 0
    numbers = [int(line.split()[1].rstrip(":")) for line in result.stderr.splitlines() if line.startswith("line ")]
    assert numbers == [2, 3, 4, 5, 6, 7]
    assert "the context holds 2048" in result.stderr
    board = load(tmp_path / "results.scoreboard.json")
    assert [problem["line"] for problem in board["problems"]] == [2, 3, 4, 5, 6, 7]
    assert [entry["id"] for entry in load(tmp_path / "results.json")["result"]["results"]] == ["c", "long", "m"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\n \n", "the file is empty"),
        (b"{\n[]\n", "not one line is a case"),
    ],
)
def test_files_without_a_case(model: Path, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "cases.jsonl").write_bytes(content)
    result = run(model, tmp_path / "cases.jsonl")
    assert result.exit_code == 1
    assert message in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["cases.jsonl"]


def test_a_missing_file_and_a_missing_model(model: Path, data: Path, tmp_path: Path) -> None:
    for result in (
        run(model, tmp_path / "none.jsonl"),
        run(tmp_path, data),
        run(model, data, "--types", "math", "-o", "x/y"),
    ):
        assert result.exit_code == 1
        assert result.stderr.splitlines()[-1].startswith("Error: ")
        assert "Traceback" not in result.output


def test_a_run_without_an_answer_fails_and_leaves_the_old_submission(model: Path, data: Path, tmp_path: Path) -> None:
    run(model, data, "-o", "results.json")
    before = {path: path.read_bytes() for path in tmp_path.glob("results*.json")}
    long = write(tmp_path / "long.jsonl", [{**CASES[1], "prompt": "word " * 3000}])
    result = run(model, long, "-o", "results.json")
    assert result.exit_code == 1
    assert "line 1: case 'm' was not answered: " in result.stderr
    assert result.stderr.splitlines()[-1] == (
        f"Error: {long}: not one case was answered (reasons above); results.json is not written"
    )
    assert {path: path.read_bytes() for path in before} == before


def test_a_model_without_a_chat_template(model: Path, data: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(model, tmp_path / "base"))
    (base / "chat_template.jinja").unlink(missing_ok=True)
    config = load(base / "tokenizer_config.json")
    config.pop("chat_template", None)
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    manifest = load(base / "qcompile.json")
    manifest["files"] = [entry for entry in manifest["files"] if entry["name"] != "chat_template.jinja"]
    for entry in manifest["files"]:
        entry |= {"sha256": sha256_of(base / entry["name"]), "size_bytes": (base / entry["name"]).stat().st_size}
    (base / "qcompile.json").write_text(json.dumps(manifest))
    result = run(base, data, "-o", "results.json", "--samples", 1)
    assert result.exit_code == 0, result.stderr
    assert "note: no chat template (a base model): prompts are used as they are" in result.stderr
    board = load(tmp_path / "results.scoreboard.json")
    assert board["notes"] == ["no chat template (a base model): prompts are used as they are"]
    with Engine(base, threads=1) as engine:
        wanted = engine.generate([case["asked"] for case in board["cases"]], SamplingParams(max_new_tokens=12))
    assert [case["texts"][0]["text"] for case in board["cases"]] == [completion.text for completion in wanted]
    raw = run(base, data, "-o", "results.json", "--raw", "--template-arg", "think=true").stderr
    assert raw.count("no chat template") == 0
    assert raw.count("note: the prompts do not go through a chat template: --template-arg changes nothing\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes")
def test_the_cases_are_read_once(model: Path, data: Path, tmp_path: Path) -> None:
    pipe, content = tmp_path / "pipe.jsonl", data.read_bytes()
    os.mkfifo(pipe)

    def feed() -> None:
        pipe.write_bytes(content)
        pipe.unlink()  # what was read is hashed, not what stands there at the end

    feeder = threading.Thread(target=feed, daemon=True)
    feeder.start()
    result = run(model, pipe, "-o", "results.json")
    feeder.join(10)
    assert result.exit_code == 0, result.stderr
    assert load(tmp_path / "results.scoreboard.json")["data"]["sha256"] == sha256_of(data)


@pytest.mark.parametrize("options", [("-o", "cases.jsonl"), ("-o", "r.json", "--html", "r.scoreboard.json")])
def test_outputs_never_take_the_place_of_the_cases(model: Path, data: Path, options: tuple[object, ...]) -> None:
    before = data.read_bytes()
    assert run(model, data, *options).exit_code in (1, 2)
    assert data.read_bytes() == before


@pytest.mark.parametrize("option", ["-o", "--html"])
def test_a_pipe_is_never_replaced_by_a_file(model: Path, data: Path, tmp_path: Path, option: str) -> None:
    os.mkfifo(tmp_path / "pipe")  # as /dev/null would be, by root
    result = run(model, data, "-o", "results.json", option, "pipe")
    assert result.exit_code == 1
    assert "pipe: is a device or a pipe; name a file" in result.stderr
    assert (tmp_path / "pipe").is_fifo()
    assert not list(tmp_path.glob("results*"))


def test_a_link_stays_one_and_what_it_names_is_written(model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "results.json").symlink_to("kept/results.json")
    assert run(model, data, "-o", "results.json").exit_code == 0
    assert (tmp_path / "results.json").is_symlink()
    assert len(load(tmp_path / "kept" / "results.json")["result"]["results"]) == 4


def test_runs_whose_names_differ_behind_a_dot_keep_their_own_scoreboards(
    model: Path, data: Path, tmp_path: Path
) -> None:
    for name in ("qwen3-0.6b", "qwen3-0.6b-int8", "all.json"):
        assert run(model, data, "-o", name, "--types", "math").exit_code == 0
    boards = {path.name for path in tmp_path.glob("*.scoreboard.json")}
    assert boards == {"qwen3-0.6b.scoreboard.json", "qwen3-0.6b-int8.scoreboard.json", "all.scoreboard.json"}
    assert len(list(tmp_path.glob("*.journal-*.jsonl"))) == 3


def test_a_name_too_long_is_said_before_anything_is_asked(model: Path, data: Path, tmp_path: Path) -> None:
    result = run(model, data, "--html", "x" * 250)
    assert result.exit_code == 1
    assert "name is too long; take a shorter one" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [data.name]


def test_the_page_is_written_when_nobody_reads_the_table(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("qcompile.cli.eval.print_whole", gone)
    assert run(model, data, "-o", "results.json", "--html", "page.html").exit_code != 0
    assert "<details" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_other_settings_are_announced(model: Path, data: Path) -> None:
    run(model, data, "-o", "results.json")
    result = run(model, data, "-o", "results.json", "--seed", 7)
    assert "was made with another model or other settings (settings.seed 0 → 7): starting anew" in result.stderr
    assert "going on" not in result.stderr


def test_fresh_forgets(model: Path, data: Path, tmp_path: Path) -> None:
    run(model, data, "-o", "results.json")
    (journal,) = tmp_path.glob("*.journal-*")
    before = journal.read_bytes()
    assert "going on" not in run(model, data, "-o", "results.json", "--fresh").stderr
    assert journal.read_bytes() != before


def test_fresh_never_forgets_a_run_in_progress(model: Path, data: Path, tmp_path: Path) -> None:
    run(model, data, "-o", "results.json")
    (path,) = tmp_path.glob("*.journal-*")
    before = path.read_bytes()
    with Journal(
        tmp_path / "results.json",
        {k: v for k, v in json.loads(before.splitlines()[0]).items() if k in ("model", "settings")},
    ) as journal:
        assert journal.path == path
        result = run(model, data, "-o", "results.json", "--fresh")
    assert result.exit_code == 1
    assert "another qcompile eval is writing it" in result.stderr
    assert path.read_bytes() == before


def test_types_limit_and_templates(model: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "cases.jsonl", [{**case, "id": f"{case['id']}{n}"} for case in CASES for n in range(3)])
    (tmp_path / "own.toml").write_text("[math]\nen = '{prompt} Box it.'\n")
    result = run(model, data, "-o", "r.json", "--types", "math, choice", "--limit", 2, "--templates", "own.toml")
    assert result.exit_code == 0
    board = load(tmp_path / "r.scoreboard.json")
    assert [case["id"] for case in board["cases"]] == ["c0", "c1", "m0", "m1"]
    assert board["cases"][2]["asked"] == "1 + 1? Box it."
    (tmp_path / "own.toml").write_text("[math]\nen = 'nothing'\n")
    assert "the text must hold {prompt}" in run(model, data, "--templates", "own.toml").stderr


@pytest.mark.parametrize(
    "options",
    [
        ("--types", "essay"),
        ("--limit", 0),
        ("--samples", 0),
        ("--batch-size", 0),
        ("--threads", 0),
        ("--top-p", 0),
        ("--temperature", -1),
        ("--sample-temperature", 0),
        ("--seed", -1),
        ("--code-timeout", 0),
        ("--template-arg", "novalue"),
        ("--template-arg", "messages=1"),
        ("--template-arg", "self=1"),
        ("--unknown",),
    ],
)
def test_usage_errors(model: Path, data: Path, options: tuple[object, ...]) -> None:
    assert run(model, data, *options).exit_code == 2


@pytest.mark.parametrize("entry", ["x", "maths=3", "0"])
def test_token_limits_that_are_none(model: Path, data: Path, entry: str) -> None:
    result = run(model, data, "--max-new-tokens", entry)
    assert result.exit_code == 1
    assert f"--max-new-tokens {entry}" in result.stderr


MANY = [{"id": f"m{n}", "type": "math", "prompt": f"{n} + 1?"} for n in range(60)]


class TestInterruption:
    """A real process, a real signal."""

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
    def test_what_is_finished_is_not_run_again(self, model: Path, tmp_path: Path, number: signal.Signals) -> None:
        data = write(tmp_path / "cases.jsonl", MANY)
        process = self._start(model, data)
        journal = self._wait_for(tmp_path, lines=12)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        samples = [line for line in journal.read_bytes().splitlines(keepends=True) if b'"sample"' in line]
        assert process.returncode == (130 if number == signal.SIGINT else -9)
        assert not (tmp_path / "results.json").exists()
        assert 10 <= len(samples) < 60
        if number == signal.SIGINT:
            assert f"interrupted; what is finished is in {journal.name}, the same command goes on" in stderr
            assert all(line.endswith(b"\n") for line in samples)
        rest = self._start(model, data)
        _, stderr = rest.communicate(timeout=60)
        assert rest.returncode == 0, stderr
        after = [line for line in journal.read_bytes().splitlines(keepends=True) if b'"sample"' in line]
        assert after[: len(samples)] == samples
        assert len(after) == len({json.loads(line)["key"] for line in after}) == 60
        assert self._whole(model, data, tmp_path) == load(tmp_path / "results.json")

    def _start(self, model: Path, data: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "qcompile.cli.main", "eval", str(model), str(data), "-o", "results.json"]
        options = ["--max-new-tokens", "200", "--batch-size", "2", "--threads", "1"]
        root = str(Path(__file__).parents[2])
        return subprocess.Popen(
            [*command, *options], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
            env={**os.environ, "PYTHONPATH": root}, start_new_session=True,
        )  # fmt: skip

    def _wait_for(self, folder: Path, lines: int) -> Path:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for journal in folder.glob("results.journal-*.jsonl"):
                if journal.read_bytes().count(b"\n") >= lines:
                    return journal
            time.sleep(0.01)
        raise AssertionError("the journal does not grow")

    def _whole(self, model: Path, data: Path, folder: Path) -> Any:
        arguments = ["eval", str(model), str(data), "-o", "whole.json", "--max-new-tokens", "200", "--batch-size", "2"]
        assert CliRunner().invoke(cli, [*arguments, "--threads", "1"]).exit_code == 0
        return load(folder / "whole.json")
