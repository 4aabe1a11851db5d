"""The compiled model inside a package."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qcompile.errors import PackageError
from qcompile.package.check_contest import unpack_package
from qcompile.package.contest.settings import ContestSettings
from qcompile.package.findings import Report
from qcompile.runtime.manifest import MANIFEST_NAME


def compiled_folders(package: Path) -> list[Path]:
    """The compiled-model directories of an unpacked package, best rung first."""
    try:
        rungs = [package / rung.path for rung in ContestSettings.load(package).ladder]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        rungs = [path.parent for path in sorted(package.rglob(MANIFEST_NAME))]
    return [path for path in rungs if (path / MANIFEST_NAME).is_file()]


@contextmanager
def compiled_model(package: Path) -> Iterator[Path]:
    """Yield the compiled-model directory that a package runs first; a zip's is unpacked for as long.

    Raises:
        PackageError: There is none.
    """
    if (package / MANIFEST_NAME).is_file():
        yield package
        return
    with tempfile.TemporaryDirectory(prefix="qcompile-judge-") as folder:
        report = Report("contest")
        if not unpack_package(package, Path(folder), report):
            raise PackageError(f"{package}: {report.findings[0]}")
        found = compiled_folders(Path(folder))
        if not found:
            raise PackageError(f"{package}: holds no compiled model of qcompile; the matrix needs one")
        yield found[0]
