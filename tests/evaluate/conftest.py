"""Fixtures of the tests that run a scripted engine."""

from functools import lru_cache
from pathlib import Path

import pytest

from qcompile.evaluate import checkers, sandbox
from tests.evaluate.scripted_run import records, write

_run_code = lru_cache(sandbox.run_code)


@pytest.fixture
def each_program_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same few programs over and over: each is really run, once; nobody waits for the disk."""
    monkeypatch.setattr(checkers, "run_code", _run_code)
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.setattr("qcompile.evaluate.judging.stop_running", lambda: None)  # a killed one must not be remembered


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "cases.jsonl", records())
