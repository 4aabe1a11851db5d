"""Writing a package: a zip that appears whole or not at all, and is the same bytes for the same content."""

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qcompile.errors import PackageError
from qcompile.weights_writer import write_failure

_EPOCH = (1980, 1, 1, 0, 0, 0)  # zip knows no earlier date
_CHUNK_BYTES = 4 << 20
_MODE_FILE, _MODE_PROGRAM = 0o100644, 0o100755


class PackageWriter:
    """Adds files to a package; see `open_package`."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive

    def add_text(self, name: str, text: str) -> None:
        """Put a text file in, compressed."""
        self._archive.writestr(_entry(name, zipfile.ZIP_DEFLATED), text.encode("utf-8"))

    def add_file(self, name: str, path: Path) -> None:
        """Put a file in as it is: weights and wheels do not compress.

        Raises:
            PackageError: It cannot be read.
        """
        entry = _entry(name, zipfile.ZIP_STORED)
        try:
            entry.file_size = path.stat().st_size
            with path.open("rb") as source, self._archive.open(entry, "w") as target:
                while chunk := source.read(_CHUNK_BYTES):
                    target.write(chunk)
        except FileNotFoundError:
            raise PackageError(f"{path}: missing") from None


@contextmanager
def open_package(path: Path, max_bytes: int) -> Iterator[PackageWriter]:
    """Write a zip under a temporary name; it is renamed when the block ends without an error.

    Raises:
        PackageError: It cannot be written, or grew over `max_bytes`; an older one is left as it was.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(draft, "w", allowZip64=True) as archive:
            yield PackageWriter(archive)
        if (size_bytes := draft.stat().st_size) > max_bytes:
            raise PackageError(
                f"{path}: would be {size_bytes / (1 << 30):.1f} GiB, the judge takes {max_bytes / (1 << 30):g}, and is not "
                "written: leave out --checkpoint, or quantize"
            )
        draft.replace(path)
    except OSError as error:
        raise PackageError(write_failure(path, error)) from None
    finally:
        with suppress(OSError):
            draft.unlink()


def _entry(name: str, compression: int) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.compress_type = compression
    entry.external_attr = (_MODE_PROGRAM if name.endswith((".sh", ".run")) else _MODE_FILE) << 16
    return entry
