"""A complete set of wheels for one machine, found by pip and checked by their own metadata.

pip's `--platform` chooses files for another machine but evaluates the requirements' markers for this one, so what is
needed only there can be missing. Every wheel's requirements are therefore followed again, with that machine's markers.
"""

import email.parser
import filecmp
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import Version

from qcompile.errors import PackageError
from qcompile.package.platforms import WheelPlatform

_MAX_METADATA_BYTES = 4 << 20
_MAX_ROUNDS = 8
_DONE = ".complete"


@dataclass(frozen=True)
class Wheel:
    """One wheel file: its project's name, version and what it requires."""

    path: Path
    name: str
    version: Version
    requires: tuple[Requirement, ...]
    requires_python: SpecifierSet

    @property
    def pin(self) -> str:
        """The line of requirements.txt."""
        return f"{self.name}=={self.version}"


def read_wheel(path: Path) -> Wheel:
    """Read a wheel's name and METADATA.

    Raises:
        PackageError: It is no wheel.
    """
    try:
        name, version, _, _ = parse_wheel_filename(path.name)
        with zipfile.ZipFile(path) as archive:
            entry = next(e for e in archive.infolist() if e.filename.endswith(".dist-info/METADATA"))
            if entry.file_size > _MAX_METADATA_BYTES:
                raise PackageError(f"{path.name}: its METADATA is larger than {_MAX_METADATA_BYTES} bytes")
            headers = email.parser.Parser().parsestr(archive.read(entry).decode("utf-8", "replace"), headersonly=True)
        requires = tuple(Requirement(line) for line in headers.get_all("Requires-Dist") or ())
        return Wheel(path, name, version, requires, SpecifierSet(headers.get("Requires-Python") or ""))
    except (InvalidWheelFilename, InvalidRequirement, InvalidSpecifier, StopIteration) as error:
        raise PackageError(f"{path.name}: not a wheel pip could read: {error or 'it has no METADATA'}") from None
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise PackageError(f"{path.name}: cannot be read as a wheel: {error}") from None


def fits(path: Path, target: WheelPlatform) -> bool:
    """Whether a wheel's tags install on that machine."""
    return bool(parse_wheel_filename(path.name)[3] & target.tags())


def missing_requirements(wheels: Sequence[Wheel], target: WheelPlatform) -> dict[str, str]:
    """What the wheels require on that machine and the set does not hold: requirement to the wheel that wants it."""
    held = {wheel.name: wheel.version for wheel in wheels}
    missing = {}
    for wheel in wheels:
        for requirement in wheel.requires:
            if requirement.marker is not None and not requirement.marker.evaluate(dict(target.environment())):
                continue
            version = held.get(canonicalize_name(requirement.name))
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                missing[f"{requirement.name}{requirement.specifier}"] = wheel.name
    return missing


def collect_wheels(
    requirements: Sequence[str],
    target: WheelPlatform,
    folder: Path | None = None,
    *,
    is_offline: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> list[Wheel]:
    """Find wheels for all requirements and everything they require.

    Args:
        requirements: In pip's words.
        target: The machine they are for.
        folder: Take them from this folder and nowhere else; None asks the index, once per set of requirements.
        is_offline: Do not ask the index; what an earlier run found is taken.
        say: Told what is going on.

    Raises:
        PackageError: pip finds no set, or the set is not complete.
    """
    cache = wheel_cache([*requirements, *([str(folder.resolve())] if folder is not None else [])], target)
    if folder is None and (cache / _DONE).is_file():
        say(f"{target.name}: wheels from {cache}")
        return _checked(cache, target)
    if folder is None and is_offline:
        raise PackageError(
            f"{target.name}: no wheels are kept from an earlier run; name their folder with --wheels DIR"
        )
    cache.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{cache.name}.", suffix=".tmp", dir=cache.parent))
    try:
        _download(requirements, target, folder, staging, say)
        (staging / _DONE).touch()
        _keep(staging, cache)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return _checked(cache, target)


def _keep(staging: Path, cache: Path) -> None:
    """Put a set of wheels into its place; the same set, which another run may be reading, is left there."""
    names = sorted(path.name for path in staging.iterdir())
    if cache.is_dir() and names == sorted(path.name for path in cache.iterdir()):
        _, differing, unread = filecmp.cmpfiles(staging, cache, names, shallow=False)
        if not differing and not unread:
            return
    shutil.rmtree(cache, ignore_errors=True)
    try:
        staging.replace(cache)
    except OSError:
        if not (cache / _DONE).is_file():  # else another run was faster
            raise


def wheel_cache(requirements: Sequence[str], target: WheelPlatform) -> Path:
    """The folder that keeps the wheels of these requirements."""
    digest = hashlib.sha256("\n".join(sorted(requirements)).encode()).hexdigest()[:16]
    return Path(platformdirs.user_cache_dir("qcompile")) / "wheels" / f"{target.name}-{digest}"


def _download(
    requirements: Sequence[str],
    target: WheelPlatform,
    folder: Path | None,
    staging: Path,
    say: Callable[[str], None],
) -> None:
    wanted = list(requirements)
    for _ in range(_MAX_ROUNDS):
        say(f"{target.name}: resolving {', '.join(wanted[-4:])}{' and more' if len(wanted) > 4 else ''}")
        _pip_download(wanted, target, folder, staging)
        missing = missing_requirements([read_wheel(path) for path in staging.glob("*.whl")], target)
        if not missing:
            return
        wanted += missing
    raise PackageError(f"{target.name}: the wheels still lack {', '.join(missing)}; pin their versions with --pin")


def _pip_download(wanted: Sequence[str], target: WheelPlatform, folder: Path | None, staging: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--only-binary=:all:", "--dest", str(staging), "--implementation", "cp"]
    command += ["--python-version", target.full_version]
    for name in (f"cp{target.python[0]}{target.python[1]}", "abi3", "none"):
        command += ["--abi", name]
    for name in target.platforms:
        command += ["--platform", name]
    if folder is not None:
        command += ["--no-index", "--find-links", str(folder)]
    result = subprocess.run([*command, *wanted], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        lines = [line.removeprefix("ERROR: ").strip() for line in result.stderr.splitlines() if "ERROR" in line]
        where = f"in {folder}" if folder is not None else "at the package index"
        reason = (lines or ["pip failed"])[-1][:300]
        raise PackageError(
            f"{target.name}: pip finds no complete set of wheels {where}: {reason}; "
            "give a folder that has them with --wheels DIR, or other versions with --pin NAME==VERSION"
        )


def _checked(folder: Path, target: WheelPlatform) -> list[Wheel]:
    """Read the wheels of a folder; each fits the machine and nothing is missing."""
    wheels = [read_wheel(path) for path in sorted(folder.glob("*.whl"))]
    for wheel in wheels:
        if not fits(wheel.path, target) or not wheel.requires_python.contains(target.full_version):
            raise PackageError(f"{wheel.path.name}: does not install on {target.name}; choose another with --pin")
    missing = missing_requirements(wheels, target)
    if missing:
        raise PackageError(f"{folder}: the wheels lack {', '.join(missing)}; delete the folder to resolve again")
    return wheels
