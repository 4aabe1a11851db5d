"""Quantized weights as tensors that are computed while the model is saved, one piece at a time.

A weight is cut into pieces of output rows. Codes, scales and zero points of a piece come from one computation: when the
codes are asked for, scales and zero points are kept until the writer comes to them. Whoever asks in another order makes
the piece be computed again, which gives the same numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx_ir as ir

from qcompile.quant.packing import packed_pairs
from qcompile.quant.rtn import covering_scales, grouped
from qcompile.quant.scheme import QuantizedWeight, Quantizer, WeightScheme, check_weight
from qcompile.tensors import Array, NarrowableTensor, StreamedTensor
from qcompile.weights import ColumnwiseTensor

# Of the float rows of a piece; the algorithms hold a few arrays of this size.
_PIECE_ELEMENTS = 4 << 20
_NUMPY_TYPES: dict[ir.DataType, type] = {
    ir.DataType.FLOAT: np.float32,
    ir.DataType.FLOAT16: np.float16,
    ir.DataType.BFLOAT16: ml_dtypes.bfloat16,
}


class QuantizedPieces:
    """One weight, quantized piece by piece when asked for.

    Args:
        name: Of the weight; the tensors are called `name.codes`, `name.scales` and `name.zero_points`.
        shape: (N, M).
        dtype: Of the scales: the float type of the graph.
        rows: `rows(start, stop)` is float [stop - start, M].
        quantize: What turns rows into codes and scales.
        scale_type: The type that the scales are rounded to; by default that of the graph.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        dtype: ir.DataType,
        rows: Callable[[int, int], Array],
        quantize: Quantizer,
        scale_type: ir.DataType | None = None,
    ) -> None:
        self.scale_type = scale_type or dtype
        self.name, self.dtype, self.rows, self.quantize = name, dtype, rows, quantize
        self.num_outputs, self.num_inputs = shape
        self.step = _rows_of_a_piece(shape)
        self._kept: dict[tuple[str, int], Array] = {}
        self._computed: dict[int, QuantizedWeight] = {}
        self._lock = threading.Lock()

    def compute(self) -> None:
        """Compute all pieces now and hold on to them: what they are made with (a Hessian) can then be let go."""
        for first in range(0, self.num_outputs, self.step):
            self._computed[first] = self.piece(first, self.num_outputs)
        self.quantize = _spent

    def codes(self, *, packed: bool) -> StreamedTensor:
        """Return int8 [N, M], or with two codes of 4 bits in a byte uint8 [N, M / 2]."""
        if not packed:
            return self._tensor("codes", ir.DataType.INT8, self.num_inputs, _int8)
        return self._tensor("codes", ir.DataType.UINT8, self.num_inputs // 2, _packed_codes)

    def codes_by_inputs(self) -> StreamedTensor:
        """Return int8 [M, N]: what MatMulInteger multiplies by."""
        return _TransposedCodes(self)

    def scales(self, num_groups: int) -> StreamedTensor:
        """Return the scales [N, G], in the dtype of the graph."""
        numpy_type = _NUMPY_TYPES[self.dtype]
        plain = self._tensor("scales", self.dtype, num_groups, lambda part: part.scales.astype(numpy_type))
        return self._narrowable(plain, plain.rows, plain.shape)

    def channel_scales(self) -> StreamedTensor:
        """Return the scales [N] of one group per row."""
        matrix = self.scales(1)
        return self._narrowable(
            matrix, lambda start, stop: matrix.rows(start, stop)[:, 0], ir.Shape([self.num_outputs])
        )

    def _narrowable(self, source: StreamedTensor, rows: Callable[[int, int], Array], shape: ir.Shape) -> StreamedTensor:
        """Return a tensor of scales made from those of `source`, which says what type they were rounded to."""
        pieces = {"name": source.name, "row_multiple": source.row_multiple, "piece_bytes": source.piece_bytes}
        if self.scale_type == self.dtype:
            return StreamedTensor(rows, self.dtype, shape, **pieces)  # type: ignore[arg-type]
        return NarrowableTensor(rows, self.dtype, shape, self.scale_type, **pieces)  # type: ignore[arg-type]

    def zero_points(self, num_groups: int) -> StreamedTensor:
        """Return uint8 [N, ceil(G / 2)], two zero points of 4 bits in a byte."""
        return self._tensor("zero_points", ir.DataType.UINT8, -(-num_groups // 2), _packed_zero_points)

    def piece(self, start: int, stop: int) -> QuantizedWeight:
        """Compute rows of the piece that begins at `start`, a multiple of `step`: all of it, or the first when few do."""
        if start in self._computed:
            return self._computed[start].rows(0, stop - start)
        return self.quantize(self.rows(start, min(start + self.step, self.num_outputs, stop)))

    def _tensor(
        self, kind: str, dtype: ir.DataType, width: int, extract: Callable[[QuantizedWeight], Array]
    ) -> StreamedTensor:
        row_bytes = max(1, width * dtype.bitwidth // 8)

        def rows(start: int, stop: int) -> Array:
            parts = [self._part(kind, first, stop, extract) for first in range(start, stop, self.step)]
            return np.concatenate(parts) if len(parts) > 1 else parts[0]

        return StreamedTensor(
            rows,
            dtype,
            ir.Shape([self.num_outputs, width]),
            name=f"{self.name}.{kind}",
            row_multiple=self.step,
            piece_bytes=self.step * row_bytes,
        )

    def _part(self, kind: str, first: int, stop: int, extract: Callable[[QuantizedWeight], Array]) -> Array:
        with self._lock:
            kept = self._kept.pop((kind, first), None)
        if kept is not None:
            return kept[: stop - first]
        part = self.piece(first, stop)
        if kind == "codes" and stop >= min(first + self.step, self.num_outputs):
            self.keep(first, part)
        return extract(part)

    def keep(self, first: int, part: QuantizedWeight) -> None:
        """Keep what comes with the codes of a piece, in the form in which it will be asked for."""
        with self._lock:
            self._kept[("scales", first)] = part.scales.astype(_NUMPY_TYPES[self.dtype])
            if part.zero_points is not None:
                self._kept[("zero_points", first)] = _packed_zero_points(part)


def holds_scales(scheme: WeightScheme, shape: tuple[int, int], rows: Callable[[int, int], Array], name: str) -> bool:
    """Whether a scheme's scale type has numbers for the scales of all groups of a weight; reads it piece by piece.

    Args:
        scheme: How it is to be stored.
        shape: (N, M).
        rows: `rows(start, stop)` is float [stop - start, M].
        name: What an error calls the weight.

    Raises:
        QuantError: It has NaN or infinite values.
    """
    exact, step = replace(scheme, scale_type="float32"), _rows_of_a_piece(shape)
    for start in range(0, shape[0], step):
        part = check_weight(rows(start, min(start + step, shape[0])), name)
        if not scheme.holds(covering_scales(grouped(part, exact), exact)[0]):
            return False
    return True


def _rows_of_a_piece(shape: tuple[int, int]) -> int:
    """Return how many rows a piece has: as equal as can be, since what works by columns takes as long for few rows."""
    num_pieces = -(-shape[0] // max(1, _PIECE_ELEMENTS // shape[1]))
    return -(-shape[0] // num_pieces)


class _TransposedCodes(ColumnwiseTensor):
    """int8 [M, N]: made whole at once, as every row takes from every output."""

    __slots__ = ("pieces_of_weight",)

    def __init__(self, pieces: QuantizedPieces) -> None:
        self.pieces_of_weight = pieces
        shape = ir.Shape([pieces.num_inputs, pieces.num_outputs])
        size_bytes = pieces.num_inputs * pieces.num_outputs
        name = f"{pieces.name}.codes"
        super().__init__(self._rows, ir.DataType.INT8, shape, name=name, piece_bytes=size_bytes)

    def columns(self, start: int, stop: int) -> Array:
        """Return int8 [stop - start, M]: the codes of some outputs."""
        source = self.pieces_of_weight
        first = start - start % source.step
        parts = [source.piece(at, stop).codes for at in range(first, stop, source.step)]
        return np.concatenate(parts)[start - first : stop - first].astype(np.int8, copy=False)

    def _rows(self, start: int, stop: int) -> Array:
        source = self.pieces_of_weight
        codes = np.empty((stop - start, source.num_outputs), np.int8)
        for first in range(0, source.num_outputs, source.step):
            part = source.piece(first, source.num_outputs)
            source.keep(first, part)
            codes[:, first : first + len(part.codes)] = part.codes[:, start:stop].T
        return codes


def _spent(rows: Array) -> QuantizedWeight:
    raise AssertionError("all pieces were computed")


def _int8(part: QuantizedWeight) -> Array:
    return part.codes.astype(np.int8, copy=False)


def _packed_codes(part: QuantizedWeight) -> Array:
    """Two codes to a byte, the first one low; signed ones are stored plus 8."""
    return packed_pairs(part.codes if part.zero_points is not None else (part.codes + np.int8(8)).view(np.uint8))


def _packed_zero_points(part: QuantizedWeight) -> Array:
    assert part.zero_points is not None
    return packed_pairs(part.zero_points)
