"""Run a command and write its wall time and peak resident memory as JSON: what `/usr/bin/time -v` measures.

    python tests/real/measure.py OUT.json COMMAND...

A process of its own on purpose: a child inherits the peak of the process that starts it, so a test process
that has a model in memory cannot measure a small child.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    """Run the command; returns its exit code."""
    out, *command = sys.argv[1:]
    started = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    figures = {
        "seconds": round(time.perf_counter() - started, 2),
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "exit_code": os.waitstatus_to_exitcode(status),
    }
    Path(out).write_text(json.dumps(figures), encoding="utf-8")
    return int(figures["exit_code"])


if __name__ == "__main__":
    sys.exit(main())
