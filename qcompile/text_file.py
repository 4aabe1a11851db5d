"""Text files from strangers: of bounded size, UTF-8, lines of JSON; every fault is told with its place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qcompile.runtime.errors import QCompileError

# What a document in a line of .jsonl may be, and of which type
DOCUMENT_FORMS = {
    "text": "a string",
    "prompt": "a string",
    "messages": "a list of messages, one at least",
    "ids": "a list of token numbers, one at least",
}


def read_bounded(path: Path, limit_bytes: int, advice: str, error: type[QCompileError]) -> bytes:
    """Read a file whole; a file above the limit is not read to its end.

    Args:
        path: The file.
        limit_bytes: The most it may hold.
        advice: What to do about a larger one.
        error: Class of what is raised.

    Raises:
        QCompileError: Of class `error`: it cannot be read, or is too large.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(limit_bytes + 1)
    except OSError as fault:
        raise error(f"{path}: cannot be read: {fault.strerror or fault}") from None
    if len(content) > limit_bytes:
        raise error(f"{path}: more than {limit_bytes >> 20} MiB; {advice}")
    return content


def decode_utf8(content: bytes, where: str, error: type[QCompileError]) -> str:
    """Decode UTF-8, a byte order mark dropped.

    Raises:
        QCompileError: Of class `error`: it is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        raise error(
            f"{where}: not UTF-8: byte {content[fault.start]:#04x} at offset {fault.start}; convert it first "
            "(iconv -t utf-8)"
        ) from None


def is_json_lines(path: Path, error: type[QCompileError]) -> bool:
    """Whether a file of documents has one of them a line, by its ending; else it is one plain text.

    Raises:
        QCompileError: Of class `error`: it is named .json, whose brackets nobody wants to read as text.
    """
    if path.suffix.lower() == ".json":
        raise error(f"{path}: .json is not read; write one document a line and name it .jsonl, or .txt for plain text")
    return path.suffix.lower() == ".jsonl"


def json_lines(text: str, path: Path, error: type[QCompileError]) -> Iterator[tuple[str, Any]]:
    """Yield (FILE:LINE, value) of every line of a .jsonl text that is not blank.

    Raises:
        QCompileError: Of class `error`: a line is not JSON.
    """
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold U+2028
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as fault:
            raise error(f"{where}: not JSON: {fault}") from None
        yield where, value
