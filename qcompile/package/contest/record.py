"""The log of a run: what ran where, how long it took, and why something is missing.

Every line goes to a file as JSON; what a person must see also goes to stderr. A full disk or a folder that cannot be
written stops neither: the file is given up with one line on stderr, the run goes on.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, Dict, Optional

LOG_FOLDER = "contest_log"
LOG_NAME = "run.jsonl"


class Record:
    """Writes the log.

    Args:
        root: The package's folder; the log lies in `contest_log` under it.
    """

    def __init__(self, root: Path) -> None:
        self._folder: Optional[Path] = root / LOG_FOLDER
        self._lock = threading.Lock()
        try:
            self._folder.mkdir(exist_ok=True)
        except OSError as error:
            self._give_up(error)

    def note(self, event: str, **facts: Any) -> None:
        """Write one line to the file."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **facts}, ensure_ascii=False, default=str)
        with self._lock:
            if self._folder is None:
                return
            try:
                with (self._folder / LOG_NAME).open("a", encoding="utf-8", errors="replace") as stream:
                    stream.write(line + "\n")
            except OSError as error:
                self._give_up(error)

    def warn(self, event: str, message: str, **facts: Any) -> None:
        """Write one line to the file, and say it on stderr."""
        say(f"WARNING: {message}")
        self.note(event, message=message, **facts)

    def keep(self, name: str, result: Dict[str, Any]) -> None:
        """Put a result beside the log, whole or not at all."""
        with self._lock:
            if self._folder is None:
                return
            path = self._folder / name
            draft = path.with_name(f".{name}.{os.getpid()}.tmp")
            try:
                draft.write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8", errors="replace")
                draft.replace(path)
            except OSError as error:
                self._give_up(error)
                _remove(draft)

    def _give_up(self, error: OSError) -> None:
        say(f"WARNING: the log cannot be written ({error.strerror or error}); the run goes on without it")
        self._folder = None


def say(message: str) -> None:
    """Print a line on stderr; a closed or full stderr is no reason to stop."""
    try:
        sys.stderr.write(f"[qcompile] {message}\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        pass


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError:
        pass
