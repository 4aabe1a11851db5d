"""Weights of a model whose residual stream is rotated by an orthogonal Q [D, D], computed when they are read.

A weight that reads the stream through a norm, W [D, N], becomes Q^T diag(gamma) W; one that writes to it, W [K, D],
becomes W Q; the embedding, and a head tied to it, E [V, D], becomes E Q.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.quant.hadamard import Rotation
from qcompile.tensors import Array, StreamedTensor
from qcompile.weights import ColumnwiseTensor, columns_of, rows_of


class ReadingWeight(ColumnwiseTensor):
    """Q^T diag(gamma) W, for a projection of norm(h Q)."""

    __slots__ = ("gamma", "rotation", "source")

    def __init__(self, source: ir.TensorProtocol, gamma: Array, rotation: Rotation, name: str) -> None:
        self.source, self.rotation, self.gamma = source, rotation, gamma.astype(np.float32)
        super().__init__(self._rows, source.dtype, ir.Shape(source.shape.numpy()), name=name)

    def columns(self, start: int, stop: int) -> Array:
        """Return columns as rows: W^T diag(gamma) Q."""
        columns = columns_of(self.source, start, stop).astype(np.float32)
        return self.rotation.apply(columns * self.gamma).astype(self.dtype.numpy())

    def _rows(self, start: int, stop: int) -> Array:
        some = np.zeros((stop - start, self.rotation.size), np.float32)
        some[np.arange(stop - start), np.arange(start, stop)] = 1
        mixed = self.rotation.undo(some) * self.gamma
        return np.asarray(mixed @ self.source.numpy().astype(np.float32)).astype(self.dtype.numpy())


def rotated_rows(source: ir.TensorProtocol, rotation: Rotation, name: str) -> StreamedTensor:
    """Return E Q for an embedding table."""

    def rows(start: int, stop: int) -> Array:
        return rotation.apply(rows_of(source, start, stop)).astype(source.dtype.numpy())

    return StreamedTensor(rows, source.dtype, ir.Shape(source.shape.numpy()), name=name)


class WritingWeight(ColumnwiseTensor):
    """W Q, for a projection whose output is added to h Q."""

    __slots__ = ("rotation", "source")

    def __init__(self, source: ir.TensorProtocol, rotation: Rotation, name: str) -> None:
        self.source, self.rotation = source, rotation
        super().__init__(self._rows, source.dtype, ir.Shape(source.shape.numpy()), name=name)

    def columns(self, start: int, stop: int) -> Array:
        """Return columns as rows: (W Q[:, start:stop])^T."""
        some = np.zeros((stop - start, self.rotation.size), np.float32)
        some[np.arange(stop - start), np.arange(start, stop)] = 1
        mixed = self.rotation.undo(some)
        return np.asarray(mixed @ self.source.numpy().astype(np.float32).T).astype(self.dtype.numpy())

    def _rows(self, start: int, stop: int) -> Array:
        return self.rotation.apply(rows_of(self.source, start, stop)).astype(self.dtype.numpy())
