"""The journal of a run: one JSON line for everything finished, on disk before the next begins.

The first line says with which model and settings the run was made. A journal's name ends in the digest of exactly
that, so a run with another model or other settings never sees these texts, and going back to the old ones finds them
again. A line cut short by a crash or a full disk is dropped; every whole line counts.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qcompile.errors import EvaluateError
from qcompile.evaluate.sample import Generated, Judgement, Sample
from qcompile.evaluate.settings import digest_of
from qcompile.weights_writer import write_failure

if sys.platform != "win32":
    import fcntl

SCHEMA_VERSION = 1
_KEY_CHARS = 12
_MAX_SHOWN_CHARS = 16
_MAX_LINE_BYTES = 64 << 20


class Journal:
    """What is finished, read from and appended to one file.

    Args:
        output: The run's output file; the journal stands beside it.
        identity: Model and settings.
        is_fresh: Forget what the file holds, once no other run can be writing it.

    Attributes:
        samples: Finished texts by key.
        judgements: Verdicts by key.
        num_damaged: Lines that could not be read.

    Raises:
        EvaluateError: The file cannot be opened, or another run is writing it or the same output.
    """

    def __init__(self, output: Path, identity: dict[str, Any], *, is_fresh: bool = False) -> None:
        self.identity = identity
        self.path = journal_path(output, identity)
        self.samples: dict[str, Sample] = {}
        self.judgements: dict[str, Judgement] = {}
        self.num_damaged = 0
        self._seconds: dict[str, float] = {}
        self._session = digest_of(os.getpid(), os.urandom(8).hex())[:8]
        _refuse_other_writers(output, self.path)
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise EvaluateError(write_failure(self.path, error)) from None
        self._lock()
        try:
            _refuse_other_writers(output, self.path)  # again: one that began meanwhile sees this lock or is seen
        except EvaluateError:
            self.close()
            raise
        if is_fresh:
            os.ftruncate(self._fd, 0)
        self._read()

    @property
    def generated(self) -> Generated:
        """Tokens and seconds, over all sessions."""
        tokens = sum(sample.num_new_tokens for sample in self.samples.values())
        return Generated(tokens, round(sum(self._seconds.values()), 6))

    def add_sample(self, key: str, sample: Sample, elapsed_s: float) -> None:
        """Note a finished text; `elapsed_s` is this session's clock."""
        self.samples[key] = sample
        self._seconds[self._session] = elapsed_s
        self._append(
            {"kind": "sample", "key": key, "session": self._session, "elapsed_s": elapsed_s, **sample.record()}
        )

    def add_judgement(self, key: str, judgement: Judgement) -> None:
        """Note a verdict."""
        self.judgements[key] = judgement
        self._append({"kind": "verdict", "key": key, **judgement.record()})

    def close(self) -> None:
        """Give the file up."""
        os.close(self._fd)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _lock(self) -> None:
        if sys.platform == "win32":
            return
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            raise EvaluateError(
                f"{self.path}: another qcompile eval is writing it; wait for it or give another -o"
            ) from None

    def _read(self) -> None:
        with os.fdopen(os.dup(self._fd), "rb") as stream:
            whole, has_header = 0, False
            for raw in iter(lambda: stream.readline(_MAX_LINE_BYTES), b""):
                if not raw.endswith(b"\n"):
                    break
                whole += len(raw)
                has_header = self._take(raw) or has_header
            size = os.fstat(self._fd).st_size
        if whole < size:
            self.num_damaged += 1
            os.ftruncate(self._fd, whole)
        if not has_header:
            self._append({"kind": "run", "schema_version": SCHEMA_VERSION, **self.identity})

    def _take(self, raw: bytes) -> bool:
        """Take in one line; returns whether it is the header."""
        try:
            record = json.loads(raw)
            kind = record.get("kind")
            if kind == "run":
                return True
            key = record["key"]
            if kind == "sample":
                self.samples[key] = Sample.from_record(record)
                self._seconds[str(record["session"])] = float(record["elapsed_s"])
            elif kind == "verdict":
                self.judgements[key] = Judgement.from_record(record)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            self.num_damaged += 1
        return False

    def _append(self, record: dict[str, Any]) -> None:
        line = json.dumps(record, ensure_ascii=True).encode("ascii") + b"\n"
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._fd, rest) :]
            os.fsync(self._fd)
        except OSError as error:
            raise EvaluateError(
                f"{self.path}: cannot be written: {error.strerror or error}; what is finished stays, run again to go on"
            ) from None


def run_name(output: Path) -> str:
    """What the files of a run begin with; only `.json` goes: `qwen3-0.6b` and `qwen3-0.6b-int8` are two runs."""
    return output.name.removesuffix(".json")


def journal_path(output: Path, identity: dict[str, Any]) -> Path:
    """Where the journal of a run stands."""
    return output.with_name(f"{run_name(output)}.journal-{digest_of(identity)[:_KEY_CHARS]}.jsonl")


def other_runs(output: Path, identity: dict[str, Any]) -> Iterator[tuple[Path, list[str]]]:
    """Journals beside `output` of runs with another model or other settings, each with what differs."""
    for path in _other_journals(output, journal_path(output, identity)):
        yield path, _differences(_header(path), identity)


def _other_journals(output: Path, own: Path) -> Iterator[Path]:
    prefix = f"{run_name(output)}.journal-"
    for path in sorted(output.parent.iterdir()) if output.parent.is_dir() else ():
        if path != own and path.name.startswith(prefix) and path.name.endswith(".jsonl"):
            yield path


def _refuse_other_writers(output: Path, own: Path) -> None:
    """Submission and scoreboard have one name for all settings: runs that end together would mix theirs."""
    if sys.platform == "win32":
        return
    for path in _other_journals(output, own):
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError:  # deleted meanwhile
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            raise EvaluateError(
                f"{output}: another qcompile eval, with another model or other settings, is to write it ({path} is in use); "
                "wait for it or give another -o"
            ) from None
        finally:
            os.close(fd)


def _header(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            record = json.loads(stream.readline(_MAX_LINE_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs, each as `name before → after`; nothing when the old run's header could not be read."""
    before, after = _flat({name: old[name] for name in new if name in old}), _flat(new)
    if not before:
        return []
    return [
        f"{name} {_brief(before, name)} → {_brief(after, name)}"
        for name in {**after, **before}
        if (name in before, before.get(name)) != (name in after, after.get(name))
    ]


def _brief(flat: dict[str, Any], name: str) -> str:
    return str(flat[name])[:_MAX_SHOWN_CHARS] if name in flat else "not set"


def _flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
