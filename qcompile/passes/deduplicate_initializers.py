"""Store equal constants once, a tied embedding too when an exporter has folded its transpose.

    W_2                       -> W_1                                where both are the same bits
    MatMul(x, W), W = E^T     -> MatMul(x, Transpose(E))            E [V, D]: a table that a Gather reads

A tied vocabulary of a 0.5B model is a quarter of its bytes. Large weights are compared at a few places first, and in full,
piece by piece, only when these agree; weights that are still to be computed are not compared.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.passes.base import Pass, PassContext, PassResult
from qcompile.passes.fold_constants import MAX_FOLDED_BYTES
from qcompile.tensors import Array

# Constants up to this size are compared by all their bytes at once.
_SMALL_BYTES = 1 << 20
_PIECE_ELEMENTS = 8 << 20
_SAMPLES = 64


class DeduplicateInitializers(Pass):
    """Equal constants, and transposed copies of embedding tables."""

    name = "deduplicate-initializers"
    summary = "equal constants stored twice, a tied embedding stored transposed"

    def call(self, context: PassContext, result: PassResult) -> None:
        """Point every reader of a copy to the first of its kind."""
        graph = context.model.graph
        seen: dict[tuple[object, ...], list[ir.Value]] = {}
        for value in _constants(graph):
            tensor = value.const_value
            key = _key(tensor) if tensor is not None else None
            if tensor is None or key is None:
                continue
            known = seen.setdefault(key, [])
            first = next((v for v in known if v.const_value is not None and _is_same(v.const_value, tensor)), None)
            if first is None:
                known.append(value)
                continue
            ir.convenience.replace_all_uses_with(value, first)
            del graph.initializers[value.name or ""]
            result.rewrites += 1
        tied = [note for value in _constants(graph) if (note := _tie(graph, value))]
        if tied:
            result.detail["tied"] = tied
        result.rewrites += len(tied)
        result.matches = result.rewrites


def _constants(graph: ir.Graph) -> list[ir.Value]:
    """Return the initializers that nobody outside can see."""
    inputs = set(graph.inputs)
    return [v for v in graph.initializers.values() if not v.is_graph_output() and v not in inputs]


def _key(tensor: ir.TensorProtocol) -> tuple[object, ...] | None:
    """What equal constants have in common: dtype, shape, and all bytes of a small one or some of a large one."""
    is_small = tensor.nbytes <= _SMALL_BYTES
    if tensor.dtype == ir.DataType.STRING or isinstance(tensor, ir.LazyTensor):
        return None
    if tensor.dtype.bitwidth < 8 and not is_small:
        return None
    head = (tensor.dtype, tuple(tensor.shape.numpy()))
    return (*head, tensor.tobytes() if is_small else _bits(tensor).reshape(-1)[:: tensor.size // _SAMPLES].tobytes())


def _is_same(first: ir.TensorProtocol, second: ir.TensorProtocol) -> bool:
    """Compare two constants with the same key."""
    if first.nbytes <= _SMALL_BYTES or _place(first) == _place(second) is not None:
        return True
    # Mapped afresh for each piece: pages that were compared are not resident any more.
    pieces = [slice(start, start + _PIECE_ELEMENTS) for start in range(0, first.size, _PIECE_ELEMENTS)]
    return all(np.array_equal(_bits(first).reshape(-1)[piece], _bits(second).reshape(-1)[piece]) for piece in pieces)


def _place(tensor: ir.TensorProtocol) -> tuple[str, int | None] | None:
    return (str(tensor.path), tensor.offset) if isinstance(tensor, ir.ExternalTensor) else None


def _tie(graph: ir.Graph, weight: ir.Value) -> str:
    """Read a projection's weight from the embedding table when it is that table transposed; return what was tied."""
    if weight.const_value is None or not weight.uses() or not all(_is_projection(u, i) for u, i in weight.uses()):
        return ""
    table = next((v for v in _tables(graph) if _is_transpose(v.const_value, weight.const_value)), None)
    if table is None:
        return ""
    transpose = ir.node("Transpose", [table], {"perm": [1, 0]}, name=f"{table.name}.transposed")
    transpose.outputs[0].name = f"{table.name}.transposed"
    transpose.outputs[0].type, transpose.outputs[0].shape = weight.type, weight.shape
    graph.insert_before(graph[0], transpose)
    ir.convenience.replace_all_uses_with(weight, transpose.outputs[0])
    del graph.initializers[weight.name or ""]
    return f"{weight.name} is {table.name} transposed"


def _is_projection(node: ir.Node, index: int) -> bool:
    return (node.domain, node.op_type, index) == ("", "MatMul", 1)


def _tables(graph: ir.Graph) -> list[ir.Value]:
    return [v for v in _constants(graph) if any(n.op_type == "Gather" and i == 0 for n, i in v.uses())]


def _is_transpose(table: ir.TensorProtocol | None, weight: ir.TensorProtocol) -> bool:
    """Whether weight [D, V] is table [V, D] transposed, bit for bit."""
    if table is None or isinstance(table, ir.LazyTensor) or isinstance(weight, ir.LazyTensor):
        return False
    shape = tuple(int(n) for n in table.shape.numpy())
    if table.dtype != weight.dtype or len(shape) != 2 or tuple(weight.shape.numpy()) != shape[::-1]:
        return False
    # Smaller ones fold-constants would transpose again.
    if table.nbytes <= MAX_FOLDED_BYTES or table.dtype.bitwidth < 8:
        return False
    rows, columns = (np.linspace(0, size - 1, _SAMPLES).astype(np.int64) for size in shape)
    if not np.array_equal(_bits(table)[rows, columns], _bits(weight)[columns, rows]):
        return False
    step = max(1, _PIECE_ELEMENTS // shape[1])
    return all(
        np.array_equal(_bits(table)[start : start + step], _bits(weight)[:, start : start + step].T)
        for start in range(0, shape[0], step)
    )


def _bits(tensor: ir.TensorProtocol) -> Array:
    """Return a constant as unsigned numbers of its width, so that NaN equals itself."""
    array = np.ascontiguousarray(tensor.numpy())
    return array.view(f"u{array.dtype.itemsize}")
