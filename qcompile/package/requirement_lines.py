"""The lines of a requirements file as pip reads them: joined at a backslash, without comments, with the files of `-r`."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from qcompile.package.findings import PIP, Finding

_MAX_BYTES = 1 << 20
_COMMENT = re.compile(r"(^|\s)#.*$")
_OTHER_FILE = re.compile(r"(?:-r|--requirement)(?:\s*=\s*|\s+|(?<=-r))(?P<name>\S.*)")
_HASH = re.compile(r"\s--hash(?:=|\s+)(\w+):([0-9A-Fa-f]+)(?=\s|$)")


class RequirementLine(NamedTuple):
    """A requirement, where it stands, and the sha256 that its `--hash` allow."""

    where: str
    text: str
    sha256: frozenset[str]


def requirement_lines(
    root: Path, name: str, findings: list[Finding], above: tuple[str, ...] = ()
) -> list[RequirementLine]:
    """Read a file of the package, and those that it names; what pip could not read is added to `findings`."""
    path = root / name
    if not path.is_file() or path.stat().st_size > _MAX_BYTES:
        findings.append(Finding(name, "missing or larger than 1 MiB", "list name==version, one a line", PIP))
        return []
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        findings.append(Finding(name, "not UTF-8 (written by PowerShell's `>`?)", "save it as UTF-8", PIP))
        return []
    lines: list[RequirementLine] = []
    for number, line in _logical_lines(text):
        where = f"{name}:{number}"
        other = _OTHER_FILE.fullmatch(line)
        if other is None:
            hashes = frozenset(digest.lower() for kind, digest in _HASH.findall(line) if kind == "sha256")
            lines.append(RequirementLine(where, _HASH.sub("", line).strip(), hashes))
            continue
        below = _inside(root, path.parent / other["name"])
        if not below or below in (*above, name):
            wrong = "names itself again" if below else "names a file that is not in the package"
            findings.append(Finding(where, f"'{line[:80]}' {wrong}", "list its lines here", PIP))
            continue
        lines += requirement_lines(root, below, findings, (*above, name))
    return lines


def _inside(root: Path, path: Path) -> str:
    """A file's name in the package; empty when it is not there."""
    path = path.resolve()
    is_there = path.is_relative_to(root.resolve()) and path.is_file()
    return path.relative_to(root.resolve()).as_posix() if is_there else ""


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines that say something, each with the number of its first one."""
    held, first = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        first = first or number
        is_comment = line.lstrip().startswith("#")
        if line.endswith("\\") and not is_comment:
            held += line[:-1] + " "
            continue
        whole = _COMMENT.sub("", held + ("" if is_comment else line)).strip()
        if whole:
            yield first, whole
        held, first = "", 0
    if whole := _COMMENT.sub("", held).strip():
        yield first, whole
