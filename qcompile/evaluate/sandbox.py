"""Run a model's code against its tests in a process that can do nothing else.

The child (`sandbox_child.py`) limits its own CPU time, address space, file size and open files, then closes the doors
with seccomp: no new process, no exec, no socket, no signal, no change to any file. Landlock leaves it nothing to read
but Python's own library, a network namespace of its own leaves it nobody to talk to, and an audit hook refuses the
same by name. Where a kernel lacks one of these layers the others remain, and the weaker state is logged and recorded
with the results.
"""

import json
import logging
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

_logger = logging.getLogger(__name__)
_CHILD = Path(__file__).with_name("sandbox_child.py")
_MAX_REPORT_BYTES = 64 << 10
_END_S = 0.2
_warned: set[str] = set()
_running: "set[subprocess.Popen[bytes]]" = set()


@dataclass(frozen=True)
class Limits:
    """What the code may use.

    Attributes:
        wall_s: From start to kill.
        cpu_s: Processor time, whole seconds.
        memory_bytes: Address space, Python's own (about 30 MB) included.
        output_bytes: What it may print before it is killed.
    """

    wall_s: float = 8.0
    cpu_s: int = 4
    memory_bytes: int = 512 << 20
    output_bytes: int = 256 << 10


@dataclass(frozen=True)
class Outcome:
    """How a run ended: whether every test passed, why not, and how strong the sandbox was."""

    is_passed: bool
    reason: str
    isolation: str


def run_code(code: str, tests: Sequence[str], limits: Limits | None = None, without: Sequence[str] = ()) -> Outcome:
    """Execute `code`, then every statement of `tests`, in a fresh sandbox.

    Args:
        code: The program.
        tests: Statements that raise when the program is wrong.
        limits: What it may use.
        without: Layers to leave out (namespaces, landlock, seccomp, hook), to test the others alone.

    Returns:
        The outcome; whatever the code does, this function returns within about `limits.wall_s`.
    """
    limits = limits or Limits()
    nonce = secrets.token_hex(16)
    program = {"code": code, "tests": list(tests), "nonce": nonce, "limits": asdict(limits), "without": list(without)}
    with tempfile.TemporaryFile() as source, tempfile.TemporaryDirectory(prefix="qcompile-run-") as cwd:
        source.write(json.dumps(program).encode("utf-8"))
        source.seek(0)
        report_read, report_write = os.pipe()
        try:
            process = _start(source, report_write, cwd)
        finally:
            os.close(report_write)
        _running.add(process)
        try:
            with os.fdopen(report_read, "rb") as report_stream, process:
                report, killed_for = _watch(process, report_stream, limits)
        finally:
            _running.discard(process)
    return _outcome(report, nonce, killed_for, process.returncode)


def stop_running() -> None:
    """End what other threads run here, at once; what they return then is worth nothing."""
    for process in list(_running):
        process.kill()


def _start(source: IO[bytes], report_fd: int, cwd: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", str(_CHILD), str(report_fd)],
        stdin=source,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=cwd,
        env={"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"},
        pass_fds=(report_fd,),
        start_new_session=True,
    )


def _watch(process: "subprocess.Popen[bytes]", report: IO[bytes], limits: Limits) -> tuple[bytes, str]:
    """Read until the child ends or breaks a limit, then kill whatever is left of its session."""
    assert process.stdout is not None
    deadline = time.monotonic() + limits.wall_s
    collected, printed, killed_for = b"", 0, ""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        selector.register(report, selectors.EVENT_READ)
        while selector.get_map() and not killed_for:
            events = selector.select(max(0.0, deadline - time.monotonic()))
            if not events and time.monotonic() >= deadline:
                killed_for = f"ran longer than {limits.wall_s:g} s"
            for key, _ in events:
                chunk = os.read(key.fd, 65536)
                if not chunk:
                    selector.unregister(key.fileobj)
                elif key.fileobj is report:
                    collected = (collected + chunk)[:_MAX_REPORT_BYTES]
                else:
                    printed += len(chunk)
            if printed > limits.output_bytes:
                killed_for = f"printed more than {limits.output_bytes} bytes"
    _kill_session(process)
    return collected, killed_for


def _kill_session(process: "subprocess.Popen[bytes]") -> None:
    """Give the child a moment to end, then kill its session; it is reaped last, so the number is still its own."""
    deadline = time.monotonic() + _END_S
    while (
        time.monotonic() < deadline and os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    ):
        time.sleep(0.002)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()


def _outcome(report: bytes, nonce: str, killed_for: str, returncode: int) -> Outcome:
    records = [record for record in map(_record, report.splitlines()) if record.get("nonce") == nonce]
    isolation = next((str(r["isolation"]) for r in records if "isolation" in r), "unknown")
    _warn_if_weak(isolation)
    final = next((r for r in records if "passed" in r), None)
    if killed_for:
        return Outcome(False, killed_for, isolation)
    if final is not None:
        return Outcome(final["passed"] is True, _from_hex(final.get("reason", "")), isolation)
    return Outcome(False, _death(returncode), isolation)


def _from_hex(text: Any) -> str:
    """The reason; the child may have been taken over, so anything can stand here."""
    try:
        return bytes.fromhex(text).decode("utf-8")
    except (TypeError, ValueError):
        return "the report is damaged"


def _record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _death(returncode: int) -> str:
    if returncode == -signal.SIGXCPU:
        return "used up its CPU time"
    if returncode < 0:
        return f"was ended by signal {-returncode}"
    return f"ended by itself before the tests were done (exit code {returncode})"


def _warn_if_weak(isolation: str) -> None:
    if "seccomp" in isolation or isolation in _warned or isolation == "unknown":
        return
    _warned.add(isolation)
    _logger.warning(
        "code is checked WITHOUT seccomp on this machine; the sandbox has %s, which stops accidents but not an "
        "attacker: run untrusted models' code in a container",
        isolation,
    )
