"""`benchmarks/eval_batched.py` says in one line what it cannot read."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "eval_batched.py"
CASE = '{"id": "m", "type": "math", "prompt": "1 + 1?", "answer": 2}\n'


@pytest.mark.parametrize(
    ("cases", "message"),
    [("nowhere.jsonl", "nowhere.jsonl"), ("none.jsonl", "not one line"), ("one.jsonl", "no qcomp")],
)
def test_wrong_input_is_one_line(tmp_path: Path, cases: str, message: str) -> None:
    (tmp_path / "none.jsonl").write_text("{\n")
    (tmp_path / "one.jsonl").write_text(CASE)
    done = subprocess.run([sys.executable, SCRIPT, "nosuch", cases], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert message in done.stderr.splitlines()[-1]
