"""The judge's part inside the clean room: construct Competition, call get_results once per test file.

    python judge_child.py REPORT.jsonl ANSWERS_FOLDER PACKAGE_FOLDER TEST.json ...

Runs in the package's own environment: standard library only, Python 3.9. With --isolate it first takes away the network
(a network namespace of its own in which only the loopback is up).
"""

import ctypes
import json
import os
import socket
import struct
import sys
import time
import traceback
from pathlib import Path
from typing import Any, List

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


def isolate_if_asked(report: Report, arguments: List[str]) -> None:
    """Take away the network when the arguments say so, and report how that went."""
    if "--isolate" in arguments:
        arguments.remove("--isolate")
        report.write("isolation", network=isolate(), is_root=os.geteuid() == 0)


def main(arguments: List[str]) -> None:
    """Run the three steps; whatever the package does is in the report."""
    report = Report(arguments[0])
    isolate_if_asked(report, arguments)
    answers, package, tests = Path(arguments[1]), Path(arguments[2]), arguments[3:]
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
            (answers / f"{number}.json").write_text(text, encoding="utf-8")
            report.write("answered", number=number, seconds=seconds, kind=type(result).__name__)
    except BaseException as error:
        report.write(
            "error",
            stage=stage,
            type=type(error).__name__,
            message=str(error)[:2000],
            traceback=traceback.format_exc()[-8000:],
        )
        raise SystemExit(3) from None
    report.write("done")


if __name__ == "__main__":
    main(sys.argv[1:])
