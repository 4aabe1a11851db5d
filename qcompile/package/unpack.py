"""Unpack a stranger's zip: no path leaves the folder, no link, no bomb; every refusal is a finding."""

import errno
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from qcompile.errors import PackageError
from qcompile.package.findings import UNZIP, Finding

MAX_ZIP_BYTES = 10 << 30
_MAX_ENTRIES = 100_000
_MAX_UNPACKED_BYTES = 64 << 30
_MAX_RATIO = 200  # text compresses to a tenth, a bomb to a thousandth
_SMALL_BYTES = 16 << 20
_CHUNK_BYTES = 4 << 20
_MAX_DEPTH = 100
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_zip(path: Path) -> tuple[list[zipfile.ZipInfo], list[Finding]]:
    """Read a zip's directory and judge it without unpacking anything.

    Returns:
        Its entries, and what forbids to unpack them.
    """
    name = path.name
    if not path.is_file():
        return [], [Finding(name, "there is no such file", "give the path of the zip")]
    if path.stat().st_size > MAX_ZIP_BYTES:
        cure = "quantize the model, or leave out the checkpoint"
        return [], [Finding(name, f"{path.stat().st_size / (1 << 30):.1f} GiB, the judge takes 10", cure, UNZIP)]
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        kind = _kind_of(path)
        reason = error.strerror or error if isinstance(error, OSError) else error
        return [], [
            Finding(
                name,
                f"not a readable zip file{kind}: {reason}",
                "make it with `zip -r competition_submission.zip *`",
                UNZIP,
            )
        ]
    return entries, [*_size_findings(name, entries, path), *_entry_findings(entries)]


def unpack(path: Path, entries: Sequence[zipfile.ZipInfo], folder: Path) -> list[Finding]:
    """Unpack entries that `check_zip` found nothing wrong with.

    Raises:
        PackageError: This machine's disk is full, which is no fault of the package.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in entries:
                target = folder / entry.filename
                if entry.is_dir():
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as source, target.open("xb") as output:
                    shutil.copyfileobj(source, output, _CHUNK_BYTES)
                target.chmod(0o755 if entry.external_attr >> 16 & 0o111 else 0o644)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, zipfile.zlib.error) as error:  # type: ignore[attr-defined]
        return [Finding(entry.filename, f"cannot be unpacked: {error}", "make the zip again", UNZIP)]
    except OSError as error:
        refuse_full_disk(entry.filename, error)
        message = f"cannot be unpacked: {error.strerror or error}"
        is_taken = isinstance(error, FileExistsError | IsADirectoryError | NotADirectoryError)
        cure = "its name stands twice: make the zip again" if is_taken else "shorten the name"
        return [Finding(entry.filename, message, cure, UNZIP)]
    return []


def refuse_full_disk(name: str, error: OSError) -> None:
    """Tell a full disk from what is wrong with a package.

    Raises:
        PackageError: The disk is full.
    """
    if error.errno in _FULL:
        place = tempfile.gettempdir()
        raise PackageError(
            f"{name}: cannot be unpacked in {place}: {error.strerror}; free some space there, or set TMPDIR"
        ) from None


def _kind_of(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            magic = stream.read(8)
    except OSError:
        return ""
    kinds = {b"\x1f\x8b": "gzip", b"Rar!": "RAR", b"7z\xbc\xaf": "7z", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
    return next((f" but {kind}" for start, kind in kinds.items() if magic.startswith(start)), "")


def _size_findings(name: str, entries: Sequence[zipfile.ZipInfo], path: Path) -> list[Finding]:
    total = sum(entry.file_size for entry in entries)
    cure = "pack only the model and what it needs"
    if len(entries) > _MAX_ENTRIES:
        return [Finding(name, f"{len(entries)} entries, more than {_MAX_ENTRIES}", cure, UNZIP)]
    if total > _MAX_UNPACKED_BYTES:
        return [Finding(name, f"unpacks to {total / (1 << 30):.0f} GiB: a zip bomb", cure, UNZIP)]
    for entry in entries:
        if entry.file_size > _SMALL_BYTES and entry.file_size > _MAX_RATIO * max(1, entry.compress_size):
            ratio = entry.file_size // max(1, entry.compress_size)
            return [Finding(entry.filename, f"compressed {ratio} to 1: a zip bomb", cure, UNZIP)]
    if entries and total > 2 * path.stat().st_size * _MAX_RATIO:
        return [Finding(name, "its entries overlap: a zip bomb", cure, UNZIP)]
    return []


def _entry_findings(entries: Sequence[zipfile.ZipInfo]) -> list[Finding]:
    findings = []
    files: set[PurePosixPath] = set()
    for entry in entries:
        place = PurePosixPath(entry.filename)  # without doubled slashes and dots: two names can be one place
        reason, cure = _refusal(entry, place, files)
        if reason:
            findings.append(Finding(entry.filename[:200], reason, cure, UNZIP))
        if not entry.is_dir():
            files.add(place)
    return findings[:20]


def _refusal(entry: zipfile.ZipInfo, place: PurePosixPath, files: set[PurePosixPath]) -> tuple[str, str]:
    """Why an entry may not be unpacked, and the cure; `files` came before it."""
    parts = place.parts
    if stat.S_ISLNK(entry.external_attr >> 16):
        return "a symbolic link, which can leave the folder", "put the file itself into the zip (zip without -y)"
    if "\\" in entry.orig_filename:
        return "its name holds a backslash (zipped by an old Windows tool)", "zip it with 7-Zip, or on Linux"
    if not parts:
        return "its name names no file", "make the zip again"
    if entry.filename.startswith("/") or ".." in parts or ":" in parts[0]:
        return "its path leaves the folder", "zip with relative names from inside the folder"
    if entry.flag_bits & 1:
        return "it is encrypted", "zip without a password"
    if len(parts) > _MAX_DEPTH:
        return f"it lies {len(parts) - 1} folders deep", f"lay it in fewer than {_MAX_DEPTH}"
    if place in files and not entry.is_dir():
        return "it stands in the zip twice", "make the zip again from an empty file"
    if not files.isdisjoint(place.parents) or place in files:
        return "another entry makes a file of its folder", "make the zip again from an empty file"
    return "", ""
