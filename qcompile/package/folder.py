"""Writing a package that is a folder: staged beside its place, there whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qcompile.errors import PackageError
from qcompile.staging import claim_staging, discard_stale, release_staging
from qcompile.weights_writer import write_failure


class FolderWriter:
    """Adds files to a folder; see `open_folder`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def add_text(self, name: str, text: str) -> None:
        """Write a text file; programs can be executed."""
        path = self._place(name)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755 if name.endswith(".sh") else 0o644)

    def add_file(self, name: str, source: Path) -> None:
        """Copy a file."""
        shutil.copyfile(source, self._place(name))

    def _place(self, name: str) -> Path:
        path = self._root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


@contextmanager
def open_folder(path: Path) -> Iterator[FolderWriter]:
    """Write a folder under a temporary name; it is renamed when the block ends without an error.

    Raises:
        PackageError: Something is there already, or it cannot be written.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise PackageError(f"{path}: exists; delete it, or choose another folder with -o")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        discard_stale(path)
        staging, lock = claim_staging(path)
        try:
            yield FolderWriter(staging)
            staging.replace(path)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            release_staging(lock)
    except OSError as error:
        raise PackageError(write_failure(path, error)) from None
