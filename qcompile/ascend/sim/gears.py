"""Gears: one file for several shapes, chosen at run time through an input that ATC adds.

Without a choice the largest gear runs; every buffer is as large as that one wants it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qcompile.ascend.om_reader import OmPort
from qcompile.ascend.shapes import Shape

SELECTOR = "ascend_mbatch_shape_data"
Dims = tuple[int, ...]
_MIN_GEARS, _MAX_GEARS = 2, 100


class GearError(Exception):
    """Flags that make no gears: ATC's code, then its line."""


@dataclass(frozen=True)
class Variant:
    """Inputs and outputs of one gear, or of a model that has none."""

    inputs: tuple[OmPort, ...]
    outputs: tuple[OmPort, ...]

    @property
    def dims(self) -> list[int]:
        """All dimensions of all inputs one after another, as set_input_dynamic_dims takes them."""
        return [size for port in self.inputs for size in port.shape]


def gears_of(flags: Mapping[str, str], shapes: Sequence[Shape]) -> tuple[tuple[Dims, ...], ...]:
    """Return the shapes of all inputs in every gear; nothing without gears.

    Args:
        flags: Those of ATC.
        shapes: Of the inputs, None for an open dimension.

    Raises:
        GearError: The flags do not fit the shapes or each other.
    """
    batches, dims = flags.get("dynamic_batch_size", ""), flags.get("dynamic_dims", "")
    if "dynamic_image_size" in flags or (batches and dims):
        raise GearError(
            "E10009", "[--dynamic_batch_size], [--dynamic_image_size] and [--dynamic_dims] exclude each other."
        )
    if not batches and not dims:
        return ()
    num_open = sum(size is None for shape in shapes for size in shape)
    if num_open == 0:
        raise GearError("E10012", "no dimension of --input_shape is -1, which gears need.")
    if batches and any(size is None for shape in shapes for size in shape[1:]):
        raise GearError("E10018", "with --dynamic_batch_size only the first dimension may be -1.")
    texts = (
        [[text] * num_open for text in batches.split(",")] if batches else [part.split(",") for part in dims.split(";")]
    )
    if not _MIN_GEARS <= len(texts) <= _MAX_GEARS:
        raise GearError("E10035" if len(texts) < _MIN_GEARS else "E10036", f"{len(texts)} gears; 2 to 100 are taken.")
    if any(len(numbers) != num_open for numbers in texts):
        raise GearError("E10045", f"a gear has not as many numbers as there are -1 in --input_shape, {num_open}.")
    if not all(number.isdecimal() and int(number) > 0 for numbers in texts for number in numbers):
        raise GearError("E10001", "a gear is no positive number.")
    return tuple(_filled(shapes, [int(number) for number in numbers]) for numbers in texts)


def _filled(shapes: Sequence[Shape], sizes: list[int]) -> tuple[Dims, ...]:
    rest = iter(sizes)
    return tuple(tuple(next(rest) if size is None else size for size in shape) for shape in shapes)


def with_shapes(ports: Sequence[OmPort], shapes: Sequence[Dims]) -> tuple[OmPort, ...]:
    """Return inputs or outputs with other shapes."""
    return tuple(replace(port, shape=shape) for port, shape in zip(ports, shapes, strict=True))


def chosen_by_batch(variants: Sequence[Variant], open_shapes: Sequence[Dims], batch: int) -> int | None:
    """Return the gear of a batch size: every open dimension is it."""
    for index, variant in enumerate(variants):
        sizes = {
            size
            for port, shape in zip(variant.inputs, open_shapes, strict=True)
            for size, declared in zip(port.shape, shape, strict=True)
            if declared < 0
        }
        if sizes == {batch}:
            return index
    return None
