"""The clean room: a fresh environment, installed from the package's wheels alone, without network and without root."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qcompile.package.findings import PIP, Finding

_JUDGE = Path(__file__).with_name("judge_child.py")
_NOBODY = 65534
_TAIL_BYTES = 16 << 10


@dataclass
class Outcome:
    """What happened in the room.

    Attributes:
        events: The child's report.
        log: The end of what was printed.
        has_timed_out: Whether it was stopped.
        answers: One text per test file that was answered.
        notes: What could not be isolated.
    """

    events: list[dict[str, Any]] = field(default_factory=list)
    log: str = ""
    has_timed_out: bool = False
    answers: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def event(self, name: str) -> dict[str, Any] | None:
        """The first event of that name."""
        return next((event for event in self.events if event["event"] == name), None)


class CleanRoom:
    """A temporary folder with an unpacked package and a Python of its own; see `open_room`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.package = folder / "package"
        self.python = folder / "environment" / "bin" / "python"
        self.log = folder / "log.txt"  # everything the package prints
        self.notes: list[str] = []

    def install(self, wheels: Path | None, requirements: Path, timeout_s: float) -> list[Finding]:
        """Make the environment and install the requirements from a folder of wheels; None: there are none."""
        venv.EnvBuilder(with_pip=False, symlinks=True).create(self.folder / "environment")
        if wheels is None:
            return []
        command = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--quiet", "--no-index"]
        command += ["--no-input", "--disable-pip-version-check", "--no-cache-dir"]
        command += ["--find-links", str(wheels), "-r", str(requirements)]
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return [Finding("requirements.txt", f"not installed within {timeout_s:g} s", "bring fewer wheels", PIP)]
        if result.returncode == 0:
            return []
        lines = (
            [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
            or result.stderr.splitlines()[-1:]
            or ["pip failed"]
        )
        return [Finding("requirements.txt", lines[-1].removeprefix("ERROR: ")[:300], "bring that wheel too", PIP)]

    def use_this_environment(self) -> None:
        """Run the package in this process's own environment, which has what it needs."""
        self.python = Path(sys.executable)

    def run_judge(
        self, tests: Sequence[Path], timeout_s: float, *, is_isolated: bool = True, simulated: Sequence[str] = ()
    ) -> Outcome:
        """Construct once, call once per test file; killed when it takes longer than it may.

        Args:
            tests: The files.
            timeout_s: For everything.
            is_isolated: Without network and root.
            simulated: Chip and CANN of the simulated device, where the package's .om files are for it.
        """
        arguments = [str(self.package), *map(str, tests), *(["--simulate", *simulated] if simulated else [])]
        return self.run(_JUDGE, arguments, timeout_s, is_isolated=is_isolated)

    def run(self, child: Path, arguments: Sequence[str], timeout_s: float, *, is_isolated: bool = True) -> Outcome:
        """Run one of our programs in the room: it gets a report, a folder for answers, and the arguments."""
        report, answers = self.folder / "report.jsonl", self.folder / "answers"
        answers.mkdir()
        report.touch()
        (self.folder / "home").mkdir(exist_ok=True)
        for path in child.parent.glob("*_child.py"):
            shutil.copy(path, self.folder)
        command = [str(self.python), "-B", str(self.folder / child.name), str(report), str(answers), *arguments]
        command += ["--isolate"] if is_isolated else []
        outcome = Outcome(notes=self.notes)
        identity = self._without_root() if is_isolated else {}
        with self.log.open("wb") as stream:
            process = subprocess.Popen(
                command,
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self._environment(),
                start_new_session=True,
                **identity,
            )
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                outcome.has_timed_out = True
            finally:
                _end_session(process)
        outcome.log = _tail(self.log)
        outcome.events = _events(report)
        outcome.answers = [path.read_text(encoding="utf-8", errors="replace") for path in _numbered(answers)]
        self._note_isolation(outcome, is_isolated=is_isolated, is_dropped=bool(identity))
        return outcome

    def _environment(self) -> dict[str, str]:
        kept = {
            name: os.environ[name]
            for name in ("ASCEND_HOME_PATH", "LD_LIBRARY_PATH", "QCOMPILE_ACL")
            if name in os.environ
        }
        path = f"{self.python.parent}:/usr/local/bin:/usr/bin:/bin"
        return {**kept, "PATH": path, "HOME": str(self.folder / "home"), "LC_ALL": "C.UTF-8", "PYTHONUNBUFFERED": "1"}

    def _without_root(self) -> dict[str, Any]:
        """How to start the child as nobody, when this process is root and nobody can run that Python."""
        if os.geteuid() != 0:
            return {}
        identity: dict[str, Any] = {"user": _NOBODY, "group": _NOBODY, "extra_groups": []}
        try:
            trial = [str(self.python), "-c", "import encodings"]
            subprocess.run(trial, check=True, capture_output=True, cwd="/", **identity)
        except (OSError, subprocess.SubprocessError):
            self.notes.append(f"root could not be given up: nobody else may run {self.python.resolve()}")
            return {}
        for path in (self.folder, *self.folder.rglob("*")):
            if not path.is_symlink() and self.folder / "environment" not in path.parents:
                os.chown(path, _NOBODY, _NOBODY)
        return identity

    @staticmethod
    def _note_isolation(outcome: Outcome, *, is_isolated: bool, is_dropped: bool) -> None:
        seen = outcome.event("isolation")
        if not is_isolated:
            outcome.notes.append("run without isolation")
        elif seen is None:
            outcome.notes.append("the child did not start: nothing was isolated")
        elif seen["network"]:
            outcome.notes.append(f"the network could not be taken away: {seen['network']}")
        elif os.geteuid() == 0 and not is_dropped:
            outcome.notes.append("run as the owner of root's files, without root's powers (a user namespace)")


@contextmanager
def open_room() -> Iterator[CleanRoom]:
    """Make a clean room; it is deleted when the block ends."""
    folder = Path(tempfile.mkdtemp(prefix="qcompile-room-"))
    try:
        folder.chmod(0o755)
        (folder / "package").mkdir()
        yield CleanRoom(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _end_session(process: "subprocess.Popen[bytes]") -> None:
    """Kill whatever the package left running."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()


def _tail(path: Path) -> str:
    with path.open("rb") as stream:
        stream.seek(0, os.SEEK_END)
        stream.seek(max(0, stream.tell() - _TAIL_BYTES))
        return stream.read().decode("utf-8", "replace")


def _events(path: Path) -> list[dict[str, Any]]:
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return [event for event in events if isinstance(event, dict) and "event" in event]


def _numbered(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json"), key=lambda path: int(path.stem) if path.stem.isdigit() else 0)
