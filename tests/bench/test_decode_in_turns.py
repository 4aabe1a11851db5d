"""`benchmarks/decode_in_turns.py` on tiny models: a line per case, a column per model, and one line for wrong input."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.optimized import export_tiny, optimize_tiny

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "decode_in_turns.py"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("turns")
    exported = export_tiny(root / "exported")
    optimize_tiny(exported, root / "fused", "fuse")
    optimize_tiny(exported, root / "int8", "fuse", "int8")
    return root


def run(cwd: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(SCRIPT), *arguments, "--threads", "1"]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_a_line_per_case_and_a_column_per_model(models: Path) -> None:
    case = ("--case", "2@8", "--case", "1@30")
    done = run(models, "fused", "int8", "fused", *case, "--turns", "2", "--steps", "4")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["2@8", "1@30"]
    for line in lines:
        numbers = [float(text) for text in re.findall(r"\d+\.\d+", line)]
        assert len(numbers) == 6
        assert numbers[1] == 1
        assert all(speedup > 0 for speedup in numbers[1::2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "nowhere"),
        (("fused", "--case", "8x128"), "ROWS@CONTEXT"),
        (("fused", "--case", "0@128"), "ROWS@CONTEXT"),
        (("fused", "--steps", "2"), "more than 2 steps"),
    ],
)
def test_wrong_input_is_one_line(models: Path, arguments: "tuple[str, ...]", message: str) -> None:
    done = run(models, *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert message in done.stderr.splitlines()[-1]
