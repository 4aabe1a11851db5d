"""Weights derived from other weights, computed row by row while the model is saved: nothing here holds a whole tensor.

Notation: a projection weight is W [M, N] with y = x W (ONNX MatMul order).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompile.errors import ShapeError
from qcompile.tensors import Array, MappedTensor, RowFunction, StreamedTensor

# Of a matrix that is mapped to take some columns, all pages may count as resident, in each thread that does so.
_LARGE_BYTES = 256 << 20
# Rows of a whole tensor are computed in pieces that are small beside it: what derives them may need some copies.
_PIECE_BYTES = 8 << 20


def rows_of(tensor: ir.TensorProtocol, start: int, stop: int) -> Array:
    """Return rows [start, stop) of a tensor without computing or copying the others."""
    if isinstance(tensor, StreamedTensor) and start % tensor.row_multiple == 0:
        return tensor.rows(start, stop)
    return np.asarray(tensor.numpy()[start:stop])


def derived_rows(
    tensor: ir.TensorProtocol, rows: RowFunction, dtype: ir.DataType, shape: Sequence[int]
) -> StreamedTensor:
    """Return a tensor derived row by row from another, in the same pieces where that one has pieces.

    Args:
        tensor: What `rows` reads.
        rows: Function from (start, stop) to the derived rows, as `StreamedTensor` takes it.
        dtype: Of the result.
        shape: Of the result; its first dimension is that of `tensor`.
    """
    multiple = getattr(tensor, "row_multiple", 1)
    piece_bytes = getattr(tensor, "piece_bytes", _PIECE_BYTES)
    return StreamedTensor(rows, dtype, ir.Shape(shape), row_multiple=multiple, piece_bytes=piece_bytes)


def transposed(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """Return W^T [N, M] of a weight [M, N]."""
    rows, columns = _matrix_shape(tensor)

    def compute(start: int, stop: int) -> Array:
        return np.ascontiguousarray(columns_of(tensor, start, stop))

    return StreamedTensor(compute, tensor.dtype, ir.Shape([columns, rows]))


def concat_columns(tensors: Sequence[ir.TensorProtocol]) -> ir.TensorProtocol:
    """Return [W_1 | W_2 | …] [M, N_1 + N_2 + …] of weights with the same M.

    Raises:
        ShapeError: The weights differ in M or in dtype.
    """
    shapes = [_matrix_shape(t) for t in tensors]
    if len({m for m, _ in shapes}) != 1 or len({t.dtype for t in tensors}) != 1:
        raise ShapeError(f"weights {shapes} of {[t.dtype.name for t in tensors]} cannot be packed side by side")

    return _SideBySide(tensors, ir.Shape([shapes[0][0], sum(n for _, n in shapes)]))


def _matrix_shape(tensor: ir.TensorProtocol) -> tuple[int, int]:
    shape = tuple(int(d) for d in tensor.shape.numpy())
    if len(shape) != 2:
        raise ShapeError(f"weight '{tensor.name}' has shape {list(shape)}, wanted a matrix")
    return shape[0], shape[1]


def columns_of(tensor: ir.TensorProtocol, start: int, stop: int) -> Array:
    """Return columns [start, stop) of a weight [M, N] as rows: float [stop - start, M]."""
    if isinstance(tensor, ColumnwiseTensor):
        return tensor.columns(start, stop)
    if isinstance(tensor, MappedTensor) and tensor.nbytes > _LARGE_BYTES:
        return tensor.read_columns(start, stop).T
    return np.asarray(tensor.numpy()[:, start:stop].T)


class ColumnwiseTensor(StreamedTensor):
    """A matrix of which some columns can be computed without the others."""

    __slots__ = ()

    def columns(self, start: int, stop: int) -> Array:
        """Return columns [start, stop) as rows: [stop - start, M]."""
        raise NotImplementedError


class _SideBySide(ColumnwiseTensor):
    """[W_1 | W_2 | …]: rows are gathered from every part, columns from the parts they fall into."""

    __slots__ = ("parts",)

    def __init__(self, parts: Sequence[ir.TensorProtocol], shape: ir.Shape) -> None:
        self.parts = tuple(parts)
        super().__init__(self._rows, parts[0].dtype, shape)

    def columns(self, start: int, stop: int) -> Array:
        pieces, offset = [], 0
        for part in self.parts:
            width = int(part.shape[1])  # type: ignore[arg-type]
            low, high = max(start - offset, 0), min(stop - offset, width)
            if low < high:
                pieces.append(columns_of(part, low, high))
            offset += width
        return np.concatenate(pieces, axis=0)

    def _rows(self, start: int, stop: int) -> Array:
        return np.concatenate([rows_of(t, start, stop) for t in self.parts], axis=1)
