"""The judge's part inside the clean room: construct Competition, call get_results once per test file.

    python judge_child.py REPORT.jsonl ANSWERS_FOLDER PACKAGE_FOLDER TEST.json ...

Runs in the package's own environment: standard library only, Python 3.9. With --isolate it first takes away the network
(a network namespace of its own in which only the loopback is up). With --simulate CHIP CANN the module `acl` is qcompile's
simulated device, for .om files that were compiled for it.
"""

import ctypes
import json
import os
import socket
import struct
import sys
import time
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, List

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 0x1


def isolate() -> str:
    """Leave the network; returns why that was not possible, or an empty text."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
            return os.strerror(ctypes.get_errno())
    except (OSError, AttributeError) as error:
        return str(error)
    _raise_loopback()
    return ""


def _raise_loopback() -> None:
    """A server on localhost, as the judge's own example starts one, needs it."""
    import fcntl

    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
            fcntl.ioctl(link, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))
    except OSError:
        pass


class Report:
    """Writes one line for everything that happened."""

    def __init__(self, path: str) -> None:
        self._path = path

    def write(self, event: str, **facts: Any) -> None:
        """Append a line."""
        with open(self._path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps({"event": event, **facts}, default=str) + "\n")

    def write_error(self, stage: str, error: BaseException) -> None:
        """Append what is being handled, with its traceback."""
        self.write(
            "error",
            stage=stage,
            type=type(error).__name__,
            message=str(error)[:2000],
            traceback=traceback.format_exc()[-8000:],
        )


def isolate_if_asked(report: Report, arguments: List[str]) -> None:
    """Take away the network when the arguments say so, and report how that went."""
    if "--isolate" in arguments:
        arguments.remove("--isolate")
        report.write("isolation", network=isolate(), is_root=os.geteuid() == 0)


@contextmanager
def device_for(arguments: List[str]) -> Iterator[None]:
    """Put the simulated device in the place of `acl`, when asked; needs qcompile in this environment."""
    if "--simulate" not in arguments:
        yield
        return
    from qcompile.ascend.sim.acl_module import simulated_acl

    place = arguments.index("--simulate")
    chip, cann = arguments[place + 1 : place + 3]
    del arguments[place : place + 3]
    with simulated_acl(chip, cann=cann, threads=os.cpu_count() or 1):
        yield


def main(arguments: List[str]) -> None:
    """Run the three steps; whatever the package does is in the report."""
    report = Report(arguments[0])
    isolate_if_asked(report, arguments)
    with device_for(arguments):
        judge(report, Path(arguments[1]), Path(arguments[2]), arguments[3:])


def judge(report: Report, answers: Path, package: Path, tests: List[str]) -> None:
    """Construct, and call get_results once per test file."""
    os.chdir(package)
    sys.path.insert(0, str(package))
    stage, start = "import", time.perf_counter()
    try:
        import competition_model  # type: ignore[import-not-found]

        stage = "construct"
        competition = competition_model.Competition()
        report.write("constructed", seconds=time.perf_counter() - start)
        for number, test in enumerate(tests):
            stage = "get_results"
            questions = json.loads(Path(test).read_text(encoding="utf-8"))
            start = time.perf_counter()
            result = competition.get_results(questions)
            seconds = time.perf_counter() - start
            stage = "result"
            text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
            (answers / "{}.json".format(number)).write_text(text, encoding="utf-8")
            report.write("answered", number=number, seconds=seconds, kind=type(result).__name__)
    except BaseException as error:
        report.write_error(stage, error)
        raise SystemExit(3) from None
    report.write("done")


if __name__ == "__main__":
    main(sys.argv[1:])
