"""Numbers and names as people read them."""

from __future__ import annotations

_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_COUNT_UNITS = ("", "K", "M", "B", "T")


def human_bytes(size_bytes: int) -> str:
    """Return a size in the largest binary unit that keeps it at or above 1: `1.84 GiB`."""
    return _scaled(size_bytes, 1024, [f" {unit}" for unit in _BYTE_UNITS])


def compact_count(count: int) -> str:
    """Return a count in thousands, millions or billions: `494 M`."""
    return _scaled(count, 1000, [f" {unit}".rstrip() for unit in _COUNT_UNITS])


def human_change(before: int, after: int) -> str:
    """Return how `after` compares with `before`: `-75.0 %`, `=`, `new` or `gone`."""
    if before == after:
        return "="
    if before == 0:
        return "new"
    if after == 0:
        return "gone"
    return f"{(after - before) / before:+.1%}".replace("%", " %").replace("-", "−")


def printable(text: str) -> str:
    """Return text from an untrusted file with control and formatting characters spelled out as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _scaled(value: int, base: int, units: list[str]) -> str:
    scaled, unit = float(value), 0
    while abs(scaled) >= base and unit < len(units) - 1:
        scaled /= base
        unit += 1
    digits = 0 if unit == 0 or abs(scaled) >= 100 else 1 if abs(scaled) >= 10 else 2
    return f"{scaled:.{digits}f}{units[unit]}"
