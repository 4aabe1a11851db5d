"""From a Triton function to the Ascend adapter's linalg, by a child in the kernels environment."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from qcompile.errors import KernelError
from qcompile.kernel_check.environment import CURE, KernelsEnv

_SCRIPT = Path(__file__).with_name("ahead_of_time.py")
_START_S = 120  # importing triton on a busy machine
_END_S = 5  # for threads to see the end of a killed child


@dataclass(frozen=True)
class Job:
    """One function at one set of types and block sizes."""

    file: Path
    function: str
    signature: Mapping[str, str]
    constants: Mapping[str, int | float | bool]

    def record(self) -> dict[str, Any]:
        """Return what the child reads."""
        signature, constants = dict(self.signature), dict(self.constants)
        return {"file": str(self.file), "function": self.function, "signature": signature, "constants": constants}


@dataclass(frozen=True)
class Lowered:
    """What became of a job: linalg text, or the stage that refused it and why.

    Attributes:
        linalg: MLIR text; "" when a stage refused.
        stage: "" | "frontend" (Triton itself) | "adapter" (Triton IR to linalg).
        error: What that stage said.
    """

    linalg: str
    stage: str = ""
    error: str = ""


def lower(jobs: list[Job], chip: str, env: KernelsEnv, time_limit_s: float = 60) -> Iterator[Lowered]:
    """Lower jobs one after the other, each within a time limit; a crash or a hang costs its own job only.

    Raises:
        KernelError: The child does not start, or cannot import triton.
    """
    done = 0
    while done < len(jobs):
        left, answered = jobs[done:], 0
        for lowered in _batch(left, chip, env, time_limit_s):
            yield lowered
            answered += 1
        done += answered


def _batch(jobs: list[Job], chip: str, env: KernelsEnv, time_limit_s: float) -> Iterator[Lowered]:
    """Answer jobs until one ends its child; that one's answer is the last."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        child = _start(env, folder, log)
        lines, threads = _feed(child, {"chip": chip, "jobs": [job.record() for job in jobs]})
        try:
            _await_triton(lines, child, log, env)
            for number in range(len(jobs)):
                try:
                    line = lines.get(timeout=time_limit_s)
                except queue.Empty:
                    yield Lowered("", "frontend", f"not done after {time_limit_s:g} s")
                    return
                if line is None:
                    yield Lowered("", "frontend", _end(child, log))
                    return
                lowered = _answer(line, number)
                yield lowered or Lowered(
                    "", "frontend", f"the kernel file wrote into the answers: {line.strip()[:80]!r}"
                )
                if lowered is None:  # which of the next lines belongs to which job cannot be told
                    return
        finally:
            end_group(child, threads)


def _await_triton(
    lines: queue.Queue[str | None], child: subprocess.Popen[str], log: IO[bytes], env: KernelsEnv
) -> None:
    try:
        line = lines.get(timeout=_START_S)
    except queue.Empty:
        raise KernelError(
            f"{env.python}: triton is not imported after {_START_S} s; try again when less runs"
        ) from None
    if line is None:
        raise KernelError(f"{env.python}: triton cannot be imported: {_end(child, log)}; {CURE}")


def _start(env: KernelsEnv, folder: str, log: IO[bytes]) -> subprocess.Popen[str]:
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("TRITON_", "PYTHON"))}
    environ |= {"TRITON_CACHE_DIR": folder, "TMPDIR": folder}
    command = [str(env.python), "-I", str(_SCRIPT)]
    try:
        return subprocess.Popen(
            command,
            env=environ,
            cwd=folder,
            text=True,
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
    except OSError as fault:
        raise KernelError(f"{env.python}: cannot be started: {fault.strerror}") from None


def _feed(
    child: subprocess.Popen[str], request: dict[str, Any]
) -> tuple[queue.Queue[str | None], list[threading.Thread]]:
    """Send the request and return a queue of the child's lines, None at their end; two threads, so neither pipe blocks."""
    lines: queue.Queue[str | None] = queue.Queue()

    def send() -> None:
        assert child.stdin is not None
        try:
            with child.stdin:
                json.dump(request, child.stdin)
        except OSError:
            pass  # it ended early; the reader sees that

    def read() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            lines.put(line)
        lines.put(None)

    threads = [threading.Thread(target=work, daemon=True) for work in (send, read)]
    for thread in threads:
        thread.start()
    return lines, threads


def _answer(line: str, number: int) -> Lowered | None:
    """Read a line about the job of that number; None when it is no such line."""
    try:
        reply = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(reply, dict) or reply.get("job") != number or not (reply.get("linalg") or reply.get("stage")):
        return None
    return Lowered(reply.get("linalg", ""), reply.get("stage", ""), reply.get("error", ""))


def _end(child: subprocess.Popen[str], log: IO[bytes]) -> str:
    code = child.wait()
    log.seek(0)
    last = next(
        (line for line in reversed(log.read(1 << 20).decode(errors="replace").splitlines()) if line.strip()), ""
    )
    return f"the front end ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}: {last.strip()}"


def end_group(child: subprocess.Popen[str], threads: Sequence[threading.Thread] = ()) -> None:
    """End a child and what it started, and take its exit code; threads that use its pipes come to an end first."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()
    for thread in threads:
        thread.join(_END_S)  # a stream that is closed while it is read may stay open
    for stream in (child.stdin, child.stdout):
        if stream is not None and not stream.closed:
            try:
                stream.close()
            except OSError:
                pass
