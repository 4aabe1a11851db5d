"""Shapes as ATC's command line writes them: `input_ids:1,128;mask:1,2048`; -1 and `1~8` are open dimensions."""

from __future__ import annotations

from collections.abc import Mapping

from qcompile.errors import AtcError

Shape = tuple[int | None, ...]


def parse_input_shapes(text: str) -> dict[str, Shape]:
    """Read the value of --input_shape; a name with nothing behind its colon is a scalar.

    Raises:
        AtcError: It is not of that form.
    """
    shapes: dict[str, Shape] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, colon, sizes = part.rpartition(":")
        if not colon or not name:
            raise AtcError(f"input shape '{part}': 'name:1,128' is expected, inputs separated by semicolons")
        if name in shapes:
            raise AtcError(f"input shape of '{name}' is given twice")
        shapes[name] = tuple(_size(size, part) for size in sizes.split(",")) if sizes.strip() else ()
    return shapes


def format_input_shapes(shapes: Mapping[str, Shape]) -> str:
    """Write the value of --input_shape."""
    return ";".join(
        f"{name}:{','.join('-1' if size is None else str(size) for size in shape)}" for name, shape in shapes.items()
    )


def _size(text: str, part: str) -> int | None:
    text = text.strip()
    low, tilde, high = text.partition("~")
    if text == "-1" or (tilde and low.isdecimal() and (high.isdecimal() or high == "-1")):
        return None
    if not (text.isascii() and text.isdecimal()) or len(text) > 9 or int(text) < 1:
        raise AtcError(f"input shape '{part}': '{text}' is not a size; positive numbers, -1 or 1~8 are")
    return int(text)
