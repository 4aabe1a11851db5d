"""Copy the runtime and what drives it into a package, under names that clash with no installed qcompile.

`qcompile.runtime` becomes `qcompile_runtime`, `qcompile.package.contest` and `qcompile.evaluate.asking` become
`qcompile_contest`, `qcompile.package.service` becomes `qcompile_service`. Only the import lines differ from the files
here; a file that still imports qcompile is refused.
"""

import re
from pathlib import Path

import qcompile.evaluate.asking
import qcompile.package.contest
import qcompile.package.service
import qcompile.runtime
from qcompile.errors import PackageError

RUNTIME_FOLDER = "qcompile_runtime"
CONTEST_FOLDER = "qcompile_contest"
SERVICE_FOLDER = "qcompile_service"
_RENAMED = (
    ("qcompile.evaluate.asking", f"{CONTEST_FOLDER}.asking"),
    ("qcompile.package.contest", CONTEST_FOLDER),
    ("qcompile.package.service", SERVICE_FOLDER),
    ("qcompile.runtime", RUNTIME_FOLDER),
)
_IMPORT = re.compile(r"^\s*(?:from|import)\s+qcompile\b.*", re.MULTILINE)


def runtime_files() -> dict[str, str]:
    """The runtime's sources by their path in the package."""
    return _folder(Path(qcompile.runtime.__file__).parent, RUNTIME_FOLDER)


def contest_files() -> dict[str, str]:
    """The contest loop's sources by their path in the package, the way of asking with them."""
    files = _folder(Path(qcompile.package.contest.__file__).parent, CONTEST_FOLDER)
    asking = Path(qcompile.evaluate.asking.__file__)
    files[f"{CONTEST_FOLDER}/{asking.name}"] = _renamed(asking)
    return files


def service_files() -> dict[str, str]:
    """ModelArts' service by its path in the package."""
    return _folder(Path(qcompile.package.service.__file__).parent, SERVICE_FOLDER)


def _folder(folder: Path, name: str) -> dict[str, str]:
    return {f"{name}/{path.relative_to(folder).as_posix()}": _renamed(path) for path in sorted(folder.rglob("*.py"))}


def _renamed(path: Path) -> str:
    """The text of a module with its imports of qcompile renamed.

    Raises:
        PackageError: It imports a part of qcompile that does not ship.
    """
    text = path.read_text(encoding="utf-8")
    for old, new in _RENAMED:
        text = re.sub(rf"^(\s*(?:from|import)\s+){re.escape(old)}\b", rf"\g<1>{new}", text, flags=re.MULTILINE)
    left = _IMPORT.search(text)
    if left is not None:
        raise PackageError(f"{path}: '{left[0].strip()}' names a part of qcompile that does not ship; move it there")
    return text
