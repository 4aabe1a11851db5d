"""Weights that lie on a grid, as tensors that are computed while the model is saved.

A weight is read once to find the grids of its rows, and again, a piece at a time, when its codes are written; every piece is
compared with the weight before it is.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.errors import QuantError
from qcompile.passes.quantize_projections import Projection
from qcompile.quant.grid import TOLERANCE, Floats, Kind, fit_blocks
from qcompile.quant.grid_nested import NESTED
from qcompile.quant.grid_rows import CHUNK, KINDS, Grid, GridRows, NestedNumbers, Storage, rows_on_grid
from qcompile.quant.packing import packed_pairs
from qcompile.quant.scheme import check_weight
from qcompile.tensors import Array, NarrowableTensor, StreamedTensor

_PIECE_ELEMENTS = 2 << 20
_MAX_SEGMENTS = 8
_MAX_THREADS = 8
# Codes, scales and offsets are rounded each, and so is their sum.
_MAX_ERROR = 8 * TOLERANCE


@dataclass(frozen=True)
class Segment:
    """Neighbouring rows [start, stop) on grids of one form."""

    start: int
    stop: int
    grid: Grid


def find_segments(projection: Projection) -> list[Segment] | str:
    """Return the grids of a weight's rows, or why it is on none.

    Raises:
        QuantError: It has NaN or infinite values.
    """
    if not any(projection.num_inputs % kind.block == 0 for kind in KINDS):
        return f"its {projection.num_inputs} inputs are no multiple of 16, the smallest block"
    step = _rows_of_a_piece(projection)
    starts = range(0, projection.num_outputs, step)

    def grids(start: int, stop: int) -> list[Grid | None]:
        return _grids_of_chunks(check_weight(projection.rows(start, stop), projection.name))

    found: list[Grid | None] = []
    if grids(0, min(CHUNK, projection.num_outputs))[0] is not None:
        with ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_THREADS)) as pool:
            for part in pool.map(lambda start: grids(start, min(start + step, projection.num_outputs)), starts):
                found += part
    known = [grid for grid in found if grid is not None]
    if not found or len(known) < len(found):
        row = CHUNK * found.index(None) if found else 0
        last = min(row + CHUNK, projection.num_outputs) - 1
        return f"rows {row} to {last} lie on no grid of at most 8 bits in blocks of 32 or 16"
    return _joined(known, projection.num_outputs)


def _joined(grids: list[Grid], num_rows: int) -> list[Segment]:
    """Return runs of chunks with the same kind and, unless that makes many, the same bits and storage."""
    for merges in (False, True):
        segments: list[Segment] = []
        for index, grid in enumerate(grids):
            start, stop = index * CHUNK, min((index + 1) * CHUNK, num_rows)
            last = segments[-1] if segments else None
            if last is not None and last.grid.kind == grid.kind and (merges or last.grid == grid):
                segments[-1] = Segment(last.start, stop, last.grid.joined(grid))
            else:
                segments.append(Segment(start, stop, grid))
        if len(segments) <= _MAX_SEGMENTS:
            break
    return segments


def _grids_of_chunks(rows: Floats) -> list[Grid | None]:
    """Return the grid of every CHUNK rows float32 [N, M]; the first kind that fits all of them."""
    num_rows, width = rows.shape
    num_chunks = -(-num_rows // CHUNK)
    sizes = np.zeros(num_chunks * CHUNK, np.float32)
    sizes[:num_rows] = np.abs(rows).max(axis=1)
    samples = sizes.reshape(num_chunks, CHUNK).argmax(axis=1) + np.arange(num_chunks) * CHUNK
    grids: list[Grid | None] = [None] * num_chunks
    left = np.arange(num_chunks)
    for kind in KINDS:
        if width % kind.block or not len(left):
            continue
        seen = fit_blocks(rows[samples[left]].reshape(-1, kind.block), kind).fits.reshape(len(left), -1).all(axis=1)
        for chunk, grid in _fitting(rows, left[seen], kind):
            grids[chunk] = grid
        left = np.array([chunk for chunk in left if grids[chunk] is None], np.int64)
    return grids


def _fitting(rows: Floats, chunks: Array, kind: Kind) -> Iterator[tuple[int, Grid]]:
    """Yield the chunks of which all rows are on a grid of a kind."""
    if not len(chunks):
        return
    indices = (chunks[:, None] * CHUNK + np.arange(CHUNK)).reshape(-1)
    indices = indices[indices < len(rows)]
    taken = rows_on_grid(rows if len(indices) == len(rows) else rows[indices], kind)
    for position, chunk in enumerate(chunks):
        own = slice(position * CHUNK, (position + 1) * CHUNK)
        bits = taken.bits[own]
        if bits.all():
            minima = Storage.CODES if taken.minima is None else Storage.of_all(taken.minima.storage[own].tolist())
            yield int(chunk), Grid(kind, int(bits.max()), Storage.of_all(taken.scales.storage[own].tolist()), minima)


def _rows_of_a_piece(projection: Projection) -> int:
    step = max(1, _PIECE_ELEMENTS // projection.num_inputs) // CHUNK * CHUNK
    return max(CHUNK, step)


@dataclass(frozen=True)
class _Part:
    """One stored tensor of a segment: its type, the width of a row, and what of the grid it holds."""

    dtype: ir.DataType
    width: int
    extract: Callable[[GridRows], Array]
    exact_in: ir.DataType | None = None


class StoredSegment:
    """The tensors of a segment, computed piece by piece when asked for.

    Args:
        projection: The weight.
        segment: Its rows.
        two_to_a_byte: Whether codes of 4 bits are stored as LinearW4 reads them, neighbours in a byte.
    """

    def __init__(self, projection: Projection, segment: Segment, *, two_to_a_byte: bool = False) -> None:
        self.projection, self.segment, self.grid = projection, segment, segment.grid
        self.step = _rows_of_a_piece(projection)
        self._parts = self._describe(two_to_a_byte=two_to_a_byte)
        self._kept: dict[tuple[str, int, int], Array] = {}
        self._lock = threading.Lock()

    @property
    def num_rows(self) -> int:
        """Rows of the segment."""
        return self.segment.stop - self.segment.start

    def tensors(self, name: str) -> dict[str, StreamedTensor]:
        """Return what is stored, by what it is: codes, or nibbles and rest; scales and minima, or their codes and steps."""
        return {kind: self._tensor(kind, part, f"{name}.{kind}") for kind, part in self._parts.items()}

    def computed(self, start: int, stop: int) -> GridRows:
        """Return rows [start, stop) of the segment, compared with the weight.

        Raises:
            QuantError: They are not what was found when the weight was read first.
        """
        first = self.segment.start
        rows = np.asarray(self.projection.rows(first + start, first + stop), np.float32)
        found = rows_on_grid(rows, self.grid.kind, self.grid.bits)
        self._check(rows, found)
        return found

    def _check(self, rows: Floats, found: GridRows) -> None:
        blocks = rows.reshape(-1, self.grid.kind.block)
        values = found.codes.reshape(blocks.shape) * self._numbers(found.scales, self.grid.scales).reshape(-1, 1)
        if found.minima is not None:
            middle = np.float32(1 << (self.grid.bits - 1))
            minima = self._numbers(found.minima, self.grid.minima).reshape(-1, 1)
            values += middle * found.scales.values.reshape(-1, 1) - minima
        allowed = _MAX_ERROR * np.abs(blocks).max(axis=1, keepdims=True)
        if not (np.abs(values - blocks) <= allowed).all():
            raise QuantError(
                f"{self.projection.name}: its codes do not give its weights back; this is a bug in lossless"
            )

    def _numbers(self, numbers: NestedNumbers, storage: Storage) -> Floats:
        """Return numbers [N, G] of blocks as they will be read back."""
        if storage == Storage.CODES:
            return np.asarray(
                numbers.codes * np.repeat(numbers.steps, NESTED // self.grid.kind.block, axis=1), np.float32
            )
        return numbers.values.astype(np.float16).astype(np.float32) if storage == Storage.HALF else numbers.values

    def _describe(self, *, two_to_a_byte: bool) -> dict[str, _Part]:
        width, bits, kind = self.projection.num_inputs, self.grid.bits, self.grid.kind
        parts: dict[str, _Part] = {}
        if bits == 8:
            parts["codes"] = _Part(ir.DataType.INT8, width, lambda rows: rows.codes)
        elif two_to_a_byte:
            parts["codes"] = _Part(ir.DataType.UINT8, width // 2, lambda rows: packed_pairs(_unsigned(rows.codes, 4)))
        else:
            parts["nibbles"] = _Part(ir.DataType.UINT8, width // 2, lambda rows: _nibbles(_unsigned(rows.codes, bits)))
        if bits in {5, 6}:
            rest = bits - 4
            parts["rest"] = _Part(
                ir.DataType.UINT8, width * rest // 8, lambda rows: _rest(_unsigned(rows.codes, bits), rest)
            )
        num_blocks = width // kind.block
        parts |= _number_parts("scales", self.grid.scales, num_blocks, kind, lambda rows: rows.scales)
        if kind.is_affine:
            parts |= _number_parts("minima", self.grid.minima, num_blocks, kind, _minima)
        return parts

    def _tensor(self, kind: str, part: _Part, name: str) -> StreamedTensor:
        def rows(start: int, stop: int) -> Array:
            starts = range(start, stop, self.step)
            taken = [self._taken(kind, first, min(first + self.step, stop)) for first in starts]
            return np.concatenate(taken) if len(taken) > 1 else taken[0]

        row_bytes = max(1, part.width * part.dtype.bitwidth // 8)
        shape = ir.Shape([self.num_rows, part.width])
        multiple, piece_bytes = self.step, self.step * row_bytes
        if part.exact_in is None:
            return StreamedTensor(rows, part.dtype, shape, name=name, row_multiple=multiple, piece_bytes=piece_bytes)
        return NarrowableTensor(
            rows, part.dtype, shape, part.exact_in, name=name, row_multiple=multiple, piece_bytes=piece_bytes
        )

    def _taken(self, kind: str, first: int, stop: int) -> Array:
        """Return rows [first, stop) of one tensor; those of the others are kept until they are asked for."""
        with self._lock:
            kept = self._kept.pop((kind, first, stop), None)
        if kept is not None:
            return kept
        found = self.computed(first, stop)
        if kind == next(iter(self._parts)):
            others = {name: part.extract(found) for name, part in self._parts.items() if name != kind}
            with self._lock:
                self._kept.update({(name, first, stop): array for name, array in others.items()})
        return self._parts[kind].extract(found)


def _minima(rows: GridRows) -> NestedNumbers:
    assert rows.minima is not None
    return rows.minima


def _number_parts(
    name: str, storage: Storage, num_blocks: int, kind: Kind, of: Callable[[GridRows], NestedNumbers]
) -> dict[str, _Part]:
    """Return how numbers [N, G] of blocks are stored."""
    if storage == Storage.CODES:
        num_steps = num_blocks * kind.block // NESTED
        half = ir.DataType.FLOAT16
        return {
            f"{name}.codes": _Part(ir.DataType.INT8, num_blocks, lambda rows: of(rows).codes),
            f"{name}.steps": _Part(ir.DataType.FLOAT, num_steps, lambda rows: of(rows).steps, half),
        }
    exact_in = ir.DataType.FLOAT16 if storage == Storage.HALF else None
    return {name: _Part(ir.DataType.FLOAT, num_blocks, lambda rows: of(rows).values, exact_in)}


def _unsigned(codes: Array, bits: int) -> Array:
    return (codes.astype(np.int16) + np.int16(1 << (bits - 1))).astype(np.uint8)


def _nibbles(codes: Array) -> Array:
    """Return the low four bits: of the first half of a row low in the bytes, of the second half high."""
    half = codes.shape[1] // 2
    return np.asarray((codes[:, :half] & np.uint8(15)) | (codes[:, half:] << np.uint8(4)))


def _rest(codes: Array, width: int) -> Array:
    """Return the bits above the low four, `width` a code, those of neighbours in a byte, the first one lowest."""
    high = (codes >> np.uint8(4)).reshape(len(codes), -1, 8 // width)
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    return np.asarray(np.bitwise_or.reduce(high << shifts, axis=2))
