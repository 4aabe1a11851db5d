"""The child that lowers kernels: what it says of tables and sources that do not fit, and what is made of its answers."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qcompile.errors import KernelError
from qcompile.kernel_check.environment import KernelsEnv
from qcompile.kernel_check.lowering import Job, Lowered, lower
from tests.kernel_check.test_verdicts import COPY, results_of

OneKernel = Callable[..., Path]
READY = """echo '{"job": -1}'"""


@pytest.mark.parametrize(
    ("file", "old", "new", "reason"),
    [
        (
            "kernel.py",
            "@triton.jit",
            "",
            "bad/kernel.py: k: is a function, no @triton.jit function; the file has none;",
        ),
        ("tiles.toml", '"k"', '"kk"', "bad/kernel.py: kk: is not in this file; the file has k;"),
        (
            "tiles.toml",
            'n = "i32"',
            "",
            "[kernel.signature] of tiles.toml has x_ptr, o_ptr; the function takes x_ptr, o_ptr, n",
        ),
        (
            "tiles.toml",
            'n = "i32"',
            'n = "i32"\nm = "i32"',
            "has x_ptr, o_ptr, n, m; the function takes x_ptr, o_ptr, n",
        ),
        ("tiles.toml", "{ BLOCK", "{ BLOK", "constants of tiles.toml are BLOK; the function's tl.constexpr are BLOCK"),
        (
            "tiles.toml",
            "{ BLOCK = 1024 }",
            "{}",
            "constants of tiles.toml are none; the function's tl.constexpr are BLOCK",
        ),
        ("kernel.py", "arange(0", "arange(nowhere", "bad/kernel.py:6: k: NameError('nowhere is not defined')"),
    ],
)
def test_a_front_end_that_refuses_says_where_and_why(
    one_kernel: OneKernel, environment: KernelsEnv, file: str, old: str, new: str, reason: str
) -> None:
    folder = one_kernel("bad", COPY)
    path = folder / "bad" / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    result = results_of(folder, environment)["bad"]
    assert (result.verdict, result.is_expected) == ("frontend", False)
    assert reason in result.reason


def test_a_kernel_that_writes_into_the_answers_costs_its_own_result_only(
    one_kernel: OneKernel, environment: KernelsEnv
) -> None:
    write = "import os\nfor file in range(3, 20):\n    try: os.write(file, b'{}\\n')\n    except OSError: pass"
    folder = one_kernel("a_writes", COPY, head=write)
    one_kernel("b_good", COPY)
    results = results_of(folder, environment)
    assert (results["a_writes"].verdict, results["b_good"].verdict) == ("frontend", "ok")
    assert results["a_writes"].reason == "the kernel file wrote into the answers: '{}'"


def lowered_by(tmp_path: Path, script: str, time_limit_s: float = 60, jobs: int = 1) -> list[Lowered]:
    """Let a shell script take the place of the child."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    job = Job(tmp_path / "kernel.py", "k", {"x": "*fp16"}, {"BLOCK": 1})
    return list(lower([job] * jobs, "Ascend910B4", KernelsEnv(python, python), time_limit_s))


def test_the_time_limit_is_that_of_a_kernel_and_begins_after_the_import_of_triton(tmp_path: Path) -> None:
    start = time.monotonic()
    assert lowered_by(tmp_path, f"sleep 2; {READY}; exec sleep 99", 1) == [
        Lowered("", "frontend", "not done after 1 s")
    ]
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("line", ["{}", "[]", "nonsense", '{"job": 1, "linalg": "x"}', '{"job": 0}', '{"linalg": "x"}'])
def test_what_is_no_answer_is_told_and_not_taken_for_the_next_one(tmp_path: Path, line: str) -> None:
    first, second = lowered_by(tmp_path, f"""{READY}; echo '{line}'; echo '{{"job": 1, "linalg": "late"}}'""", jobs=2)
    assert first.stage == second.stage == "frontend"
    assert line in first.error


def test_a_triton_that_cannot_be_imported_is_told_once(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=r"triton cannot be imported: .*exit code 1: no such library; run `make"):
        lowered_by(tmp_path, "echo no such library >&2; exit 1", jobs=2)
