"""Ascend chips and CANN releases: names as users type them, figures as CANN's compiler has them."""

from __future__ import annotations

import difflib
import functools
import re
import sys
from dataclasses import dataclass
from importlib import resources
from typing import Any

from qcompile.errors import AtcError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Memory a program cannot have: driver, runtime and the system's own share. An estimate.
_RESERVED_BYTES = 1 << 30


@dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
        name: What `--soc_version` takes, such as Ascend910B4.
        family: ``910B``, ``310P`` or ``310B``: what the kernels are built for.
        floats: Float types its cores compute in: f16, bf16, f32.
        cube_cores: Matrix cores.
        vector_cores: Vector cores.
        clock_hz: Clock of both.
        l2_bytes: Second-level cache.
        memory_bytes: Memory on the card; on the 310B boards the smallest common fitting, shared with the host.
        bandwidth: Lower and higher published reading of the memory's bandwidth, bytes per second.
    """

    name: str
    family: str
    floats: frozenset[str]
    cube_cores: int
    vector_cores: int
    clock_hz: int
    l2_bytes: int
    memory_bytes: int
    bandwidth: tuple[float, float]

    @property
    def target(self) -> str:
        """The name of the target on the command line: ascend910b4."""
        return self.name.lower()

    @property
    def usable_bytes(self) -> int:
        """Memory left for weights, caches and work space; an estimate."""
        return self.memory_bytes - _RESERVED_BYTES


@functools.cache
def _tables() -> dict[str, Any]:
    text = resources.files("qcompile.ascend").joinpath("chips.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


@functools.cache
def chips() -> dict[str, Chip]:
    """Return every known chip by its lower-case name."""
    tables = _tables()
    found = {}
    for record in tables["chip"]:
        low, high = record["bandwidth"]
        chip = Chip(**{**record, "floats": frozenset(tables["floats"][record["family"]]), "bandwidth": (low, high)})
        found[chip.name.lower()] = chip
    return found


def chip_named(name: str) -> Chip:
    """Return the chip a user means by `ascend910b4`, `Ascend910B4` or `910B4`.

    Raises:
        AtcError: There is no such chip; the message suggests the nearest.
    """
    key = re.sub(r"[\s_]", "", name.strip().lower())
    if key[:1].isdigit():
        key = f"ascend{key}"
    if key in chips():
        return chips()[key]
    reason = _tables()["not_a_target"].get(key)
    if reason:
        raise AtcError(f"unknown SoC '{name}': {reason}")
    near = difflib.get_close_matches(key, chips(), n=1, cutoff=0.7)
    known = ", ".join(chip.name for chip in chips().values())
    hint = (
        f"did you mean {chips()[near[0]].name}? It is 'Ascend' and the Name column of npu-smi info" if near else known
    )
    raise AtcError(f"unknown SoC '{name}'; {hint if near else 'known are ' + hint}")


@dataclass(frozen=True, order=True)
class Cann:
    """A CANN release, major and minor: 8.1.RC1 is (8, 1)."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


def cann_version(text: str) -> Cann:
    """Read `8.1`, `8.1.RC1`, `9.0.1` or `V8.1`.

    Raises:
        AtcError: It is not a version.
    """
    match = re.fullmatch(r"[vV]?(\d{1,3})\.(\d{1,3})(?:[.\-_ ]?[A-Za-z0-9.\-_]*)?", text.strip())
    if match is None:
        raise AtcError(f"'{text}' is not a CANN version; write it as in 8.1 or 8.1.RC1")
    return Cann(int(match.group(1)), int(match.group(2)))


@functools.cache
def known_cann() -> tuple[Cann, ...]:
    """Return the releases the tables were written from, oldest first."""
    return tuple(cann_version(text) for text in _tables()["cann"]["releases"])


def nearest_cann(version: Cann) -> tuple[Cann, str | None]:
    """Return the release whose rules apply, and a warning when it is not the one asked for.

    A release between two known ones has the rules of the older of them: what a parser learned later, it may lack.
    """
    releases = known_cann()
    if version in releases:
        return version, None
    older = [release for release in releases if release < version]
    nearest = older[-1] if older else releases[0]
    if version < releases[0]:
        return nearest, f"CANN {version} is older than the tables know; the rules of {nearest} are used"
    if version > releases[-1]:
        return nearest, f"CANN {version} is newer than the tables know; the rules of {nearest} are used"
    return nearest, f"the tables have no CANN {version}; the rules of {nearest} are used"
