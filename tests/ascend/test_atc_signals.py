"""Signals to `qcompile atc` alone, in a real process: what its compiler started is ended with it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ascend.fake_cann import script

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")


def started(model, compiler):
    """Start `qcompile atc` in a process of its own, on a compiler that is this shell script."""
    script(Path(os.environ["ASCEND_TOOLKIT_HOME"]) / "bin/atc", f"#!/bin/sh\n{compiler}\n")
    environ = dict(os.environ) | {"PYTHONPATH": str(Path(__file__).parents[2])}
    code = f"from qcompile.cli.main import main; import sys; sys.argv = ['qcompile', 'atc', {str(model)!r}]; main()"
    return subprocess.Popen([sys.executable, "-c", code], env=environ, stderr=subprocess.PIPE, stdout=subprocess.PIPE)


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def number_in(file):
    deadline = time.monotonic() + 20
    while not (file.exists() and file.read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return int(file.read_text())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_child_of_the_compiler_that_ignores_signals_is_ended(model, cann, tmp_path, number):
    process = started(model, f"(trap '' TERM INT; sh -c 'echo $$ > {tmp_path}/pid; exec sleep 60') & wait")
    child = number_in(tmp_path / "pid")
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == (130 if number == signal.SIGINT else 128 + number)
    assert b"interrupted" in errors
    assert not is_alive(child)


def test_a_second_signal_does_not_leave_the_compiler(model, cann, tmp_path):
    process = started(model, f"trap '' TERM INT; echo $$ > {tmp_path}/pid; sleep 60")
    child = number_in(tmp_path / "pid")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)  # it waits for the compiler now
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 143
    assert not is_alive(child)
