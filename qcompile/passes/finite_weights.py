"""Refuse NaN and infinite weights by name, before anything is computed with them.

A quantizer names what it finds in its own weight (`qcompile.quant.scheme.check_weight`), but never sees a norm or a bias; and
what runs a model or mixes its weights first would only find NaN in everything that comes behind.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.errors import QuantError
from qcompile.passes.quantize_projections import Projection, find_projections
from qcompile.tensors import pieces_of

# The exponent of NaN and of infinity, all ones: such bits are found much faster than such bfloat16 numbers.
_EXPONENTS: dict[ir.DataType, np.uint32 | np.uint16] = {
    ir.DataType.FLOAT: np.uint32(0x7F800000),
    ir.DataType.FLOAT16: np.uint16(0x7C00),
    ir.DataType.BFLOAT16: np.uint16(0x7F80),
}


def check_finite(graph: ir.Graph, *, with_matrices: bool) -> None:
    """Look through the vectors of a float graph, and the weights of its projections; one piece is in memory at a time.

    Other constants may be infinite: masks are.

    Args:
        graph: Before its weights are changed, so that they have the names of the file.
        with_matrices: Whether something is computed with the weights of projections before a quantizer checks them.

    Raises:
        QuantError: One is NaN or infinite; or the graph is quantized already.
    """
    projections = {projection.source: projection for projection in find_projections(graph)}
    for value in graph.initializers.values():
        tensor, projection = value.const_value, projections.get(value)
        if tensor is None or tensor.dtype not in _EXPONENTS:
            continue
        is_vector = len(tensor.shape) == 1 and tensor.size > 1
        if not is_vector and not (with_matrices and projection is not None):
            continue
        found = _first_not_finite(tensor)
        if found is not None:
            index, number = found
            raise QuantError(
                f"'{value.name}': {_place(tensor, index, projection)} is {number}; a model with NaN or infinite weights "
                "cannot be quantized: repair the checkpoint"
            )


def _first_not_finite(tensor: ir.TensorProtocol) -> tuple[int, float] | None:
    """Return the flat index and value of the first element that is NaN or infinite."""
    exponent, start = _EXPONENTS[tensor.dtype], 0
    for _, compute in pieces_of(tensor):
        bits = np.ascontiguousarray(compute()).reshape(-1).view(exponent.dtype)
        is_bad = (bits & exponent) == exponent
        if is_bad.any():
            first = int(np.argmax(is_bad))
            return start + first, float(bits.view(tensor.dtype.numpy())[first])
        start += len(bits)
    return None


def _place(tensor: ir.TensorProtocol, index: int, projection: Projection | None) -> str:
    if projection is None:
        return f"element {index}"
    first, second = divmod(index, int(tensor.shape.numpy()[1]))
    is_by_inputs = projection.node.inputs[1] is projection.source
    row, column = (second, first) if is_by_inputs else (first, second)
    return f"row {row}, input {column}"
