"""Weights in the type and form the chip takes, computed while they are written; all graphs of a model share them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from qcompile.errors import PassError
from qcompile.tensors import Array, StreamedTensor
from qcompile.weights import rows_of

Factor = tuple[int, float]
_AT_ONCE_BYTES = 64 << 10  # vectors: what is wrong with one is said before anything is written


class TypedWeights:
    """The initializers of a lowered model by name: one object each, so that they are stored once.

    Args:
        dtype: Float type of the lowered graphs.
    """

    def __init__(self, dtype: ir.DataType) -> None:
        self.dtype = dtype
        self._made: dict[str, ir.TensorProtocol] = {}

    def get(self, name: str, make: Callable[[], ir.TensorProtocol]) -> ir.TensorProtocol:
        """Return the tensor of that name, made when first asked for."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def typed(self, name: str, tensor: ir.TensorProtocol, factor: Factor | None = None) -> ir.TensorProtocol:
        """Return a float tensor in the graphs' type.

        Args:
            name: Its name in the graphs.
            tensor: Float values of any shape.
            factor: (count, number): the first `count` of the last axis are multiplied by `number`.
        """
        return self.get(name, lambda: _typed(name, tensor, self.dtype, factor))


def _typed(name: str, tensor: ir.TensorProtocol, dtype: ir.DataType, factor: Factor | None) -> ir.TensorProtocol:
    if tensor.dtype == dtype and factor is None:
        return tensor
    numpy_dtype = dtype.numpy()
    largest = 65504.0 if dtype == ir.DataType.FLOAT16 else float(np.finfo(np.float32).max)

    def rows(start: int, stop: int) -> Array:
        values = rows_of(tensor, start, stop).astype(np.float32)
        if factor is not None:
            count = factor[0] - start if values.ndim == 1 else factor[0]  # a vector comes in pieces of its last axis
            values[..., : max(count, 0)] *= np.float32(factor[1])
        worst = float(np.abs(values).max(initial=0.0))
        if not worst <= largest:
            raise PassError(
                f"weight '{name}' holds {worst:.4g}, which {dtype.name} cannot (at most {largest:.4g}); "
                "lower with --ascend-dtype bf16, or mend the checkpoint"
            )
        return values.astype(numpy_dtype)

    if tensor.nbytes <= _AT_ONCE_BYTES:
        return ir.Tensor(rows(0, int(tensor.shape[0])), name=name)  # type: ignore[arg-type]
    return StreamedTensor(rows, dtype, ir.Shape(tensor.shape.numpy()), name=name)
