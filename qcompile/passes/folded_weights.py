"""Weights whose inputs or outputs are scaled, computed when they are read."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.quant.scheme import FloatArray
from qcompile.tensors import Array
from qcompile.weights import ColumnwiseTensor, columns_of, rows_of


class ScaledWeight(ColumnwiseTensor):
    """diag(a) W diag(b), for a weight [M, N] whose input i reads x_i / a_i and whose output j is multiplied by b_j.

    Args:
        source: The weight.
        inputs: a [M], or None.
        outputs: b [N], or None.
        name: Initializer name.
    """

    __slots__ = ("inputs", "outputs", "source")

    def __init__(
        self, source: ir.TensorProtocol, name: str, inputs: FloatArray | None = None, outputs: FloatArray | None = None
    ) -> None:
        num_inputs, num_outputs = (int(d) for d in source.shape.numpy())
        self.source = source
        self.inputs = np.ones(num_inputs, np.float32) if inputs is None else inputs
        self.outputs = np.ones(num_outputs, np.float32) if outputs is None else outputs
        super().__init__(self._rows, source.dtype, ir.Shape([num_inputs, num_outputs]), name=name)

    def columns(self, start: int, stop: int) -> Array:
        """Return columns as rows: [stop - start, M]."""
        columns = columns_of(self.source, start, stop).astype(np.float32)
        return (columns * self.inputs * self.outputs[start:stop, None]).astype(self.dtype.numpy())

    def _rows(self, start: int, stop: int) -> Array:
        rows = rows_of(self.source, start, stop).astype(np.float32)
        return (rows * self.inputs[start:stop, None] * self.outputs).astype(self.dtype.numpy())
