"""The demo names commands that work where it runs."""

import subprocess
import sys
from pathlib import Path

from examples import demo


def environment(directory: Path) -> Path:
    script = directory / "qcompile"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    return directory / "python"


def test_a_program_that_is_not_on_path_is_named_by_its_path(tmp_path, monkeypatch):
    scripts = tmp_path / ".venv" / "bin"
    scripts.mkdir(parents=True)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(sys, "executable", str(environment(scripts)))
    assert demo.program() == str(scripts / "qcompile")
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    assert demo.program() == ".venv/bin/qcompile"
    (scripts / "qcompile").unlink()
    assert demo.program() == ".venv/bin/python -m qcompile.cli.main"


def test_a_program_on_path_is_named_as_such_and_another_one_is_not(tmp_path, monkeypatch):
    mine, other = tmp_path / "mine", tmp_path / "other"
    mine.mkdir()
    other.mkdir()
    environment(other)
    monkeypatch.setattr(sys, "executable", str(environment(mine)))
    monkeypatch.setenv("PATH", str(mine))
    assert demo.program() == "qcompile"
    monkeypatch.setenv("PATH", str(other))
    assert demo.program() == str(mine / "qcompile")


def test_what_is_shown_is_what_the_shell_takes(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: None)
    demo.qcompile("--help")
    assert f"$ {demo.program()} --help" in capsys.readouterr().out
