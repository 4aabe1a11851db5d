"""Run ATC: several graphs at once where memory allows, a log per graph, finished graphs kept."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import IO

from qcompile.ascend.atc_errors import AtcFailure, AtcRunError, explain_failure, log_tail
from qcompile.ascend.atc_jobs import Job
from qcompile.ascend.atc_manifest import collect, read_record
from qcompile.ascend.legality.onnx_file import read_onnx
from qcompile.ascend.legality.view import GraphView
from qcompile.errors import AtcError
from qcompile.staging import lock_directory, release_staging

_SUCCESS = "ATC run success"
_MAX_LOG_BYTES = 8 << 20
_POLL_SECONDS = 0.1
_GRACE_SECONDS = 5.0
# job's name, what happened (started, running, kept, done), seconds since its start
Say = Callable[[str, str, float], None]


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    stream: IO[bytes]
    start: float


def run_jobs(
    jobs: Sequence[Job], atc: Sequence[str], environ: Mapping[str, str], *, at_once: int = 1, say: Say | None = None
) -> dict[str, str]:
    """Compile every job that is not finished.

    Args:
        jobs: What to compile.
        atc: The compiler: its command, before the arguments.
        environ: Its environment.
        at_once: How many may run together.
        say: Told about progress.

    Returns:
        The .om file's name by job.

    Raises:
        AtcRunError: One failed; those running beside it are ended, those finished stay.
        AtcError: The output cannot be written, or another run is compiling one of the graphs.
    """
    say = say or (lambda name, event, seconds: None)
    with ExitStack() as locks:
        for job in jobs:
            _lock(job, locks)
        return _run(jobs, atc, environ, at_once, say)


def _run(jobs: Sequence[Job], atc: Sequence[str], environ: Mapping[str, str], at_once: int, say: Say) -> dict[str, str]:
    made: dict[str, str] = {}
    waiting = []
    for job in jobs:
        record = read_record(str(job.directory), job.name)
        if record is not None and record["key"] == job.key:
            made[job.name] = record["om"]
            say(job.name, "kept", 0.0)
        else:
            waiting.append(job)
    running: list[_Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                with _held_signals():
                    running.append(_start(waiting.pop(0), atc, environ))
                say(running[-1].job.name, "started", 0.0)
            time.sleep(_POLL_SECONDS)
            for entry in list(running):
                if entry.process.poll() is None:
                    say(entry.job.name, "running", time.monotonic() - entry.start)
                    continue
                running.remove(entry)
                made[entry.job.name] = _finish(entry, atc)
                say(entry.job.name, "done", time.monotonic() - entry.start)
    finally:
        _end(running)
    return made


def _lock(job: Job, locks: ExitStack) -> None:
    """Two runs would delete each other's work: the folder of a graph belongs to one of them."""
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        locks.callback(release_staging, lock_directory(job.folder))
    except BlockingIOError:
        raise AtcError(
            f"{job.folder}: another run is compiling {job.name} here; wait until it is done, or choose another -o"
        ) from None
    except OSError as error:
        raise _unwritable(job, error) from error


def _unwritable(job: Job, error: OSError) -> AtcError:
    return AtcError(f"{job.folder}: cannot be written: {error.strerror or error}; free space or choose -o")


def _start(job: Job, atc: Sequence[str], environ: Mapping[str, str]) -> _Running:
    try:
        for entry in job.folder.iterdir():  # the folder itself is locked
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink()
        stream = job.log.open("wb")
    except OSError as error:
        raise _unwritable(job, error) from error
    try:
        process = subprocess.Popen(
            [*atc, *job.arguments],
            cwd=job.directory,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        stream.close()
        raise AtcError(f"{atc[0]}: cannot be started: {error.strerror or error}; is set_env.sh sourced?") from error
    return _Running(job, process, stream, time.monotonic())


def _finish(entry: _Running, atc: Sequence[str]) -> str:
    """Return the .om's name, or raise with what the log says: exit code, success line and file must all agree."""
    entry.stream.close()
    job, returncode = entry.job, entry.process.returncode
    text = _log_text(job)
    if returncode == 0 and _SUCCESS in text:
        try:
            return collect(str(job.directory), job.name, job.key)
        except (OSError, ValueError) as error:
            why = f"ATC reported success, but {error}"
            failure = AtcFailure("", why, "", "", "", "", "check the disk, then run it again with -- --log=debug")
    elif returncode == 0:
        why = "ATC ended without an error and without its success line"
        failure = AtcFailure("", why, "", "", "", "", "run it again with -- --log=debug")
    else:
        failure = explain_failure(text, returncode, GraphView(read_onnx(job.directory / job.graph)))
    for leftover in job.folder.glob("*.om"):
        leftover.unlink()
    raise AtcRunError(job.name, failure, [*atc, *job.arguments], returncode, log_tail(text), str(job.log))


def _log_text(job: Job) -> str:
    """Return the log; of a very long one the two ends."""
    with job.log.open("rb") as stream:
        head = stream.read(_MAX_LOG_BYTES)
        size = stream.seek(0, os.SEEK_END)
        if size > 2 * _MAX_LOG_BYTES:
            stream.seek(size - _MAX_LOG_BYTES)
        else:
            stream.seek(len(head))
        return (head + stream.read(_MAX_LOG_BYTES)).decode("utf-8", "replace")


def _end(running: Sequence[_Running]) -> None:
    """End jobs and all that their compilers started; an .om, if any, is incomplete and goes.

    A compiler may end before its children do, and who waits may send a second signal: what is left of a group is killed.
    """
    try:
        for entry in running:
            _signal_group(entry, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_SECONDS
        for entry in running:
            with suppress(subprocess.TimeoutExpired):
                entry.process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for entry in running:
            _signal_group(entry, signal.SIGKILL)
            entry.process.wait()
            entry.stream.close()
            for leftover in entry.job.folder.glob("*.om"):
                leftover.unlink(missing_ok=True)


def _signal_group(entry: _Running, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(entry.process.pid, number)


@contextmanager
def _held_signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait until a process that is being started is known to who ends it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, lambda number, _: arrived.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for held in arrived:
            signal.raise_signal(held)
