"""Find what can be quantized in a graph: the projections by a weight, and the embedding table.

MatMul(x, W), Linear(x, W, b)       W [M, N]
MatMul(x, E^T)                      a tied head: E [V, D] is the embedding table itself
Gather(E, input_ids)                the embedding
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.errors import QuantError
from qcompile.functions import DOMAIN
from qcompile.passes.matching import node_label
from qcompile.quantized_functions import EMBEDDINGS, QUANTIZED_LINEARS
from qcompile.weights import columns_of, rows_of

HEAD, EMBEDDING, DOWN, O_PROJ = "lm_head", "embed_tokens", "down_proj", "o_proj"
_AFTER = {"SwiGlu": DOWN, "Gelu": DOWN, "GeluTanh": DOWN, "Attention": O_PROJ}
Rows = Callable[[int, int], np.ndarray]
_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
_QUANTIZED = {
    *((DOMAIN, name) for name in (*QUANTIZED_LINEARS, *EMBEDDINGS)),
    *(("com.microsoft", name) for name in ("MatMulNBits", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")),
    *(("", name) for name in ("MatMulInteger", "QLinearMatMul")),
}


@dataclass(frozen=True)
class Projection:
    """A weight to quantize, read as rows of outputs.

    Attributes:
        node: The MatMul, Linear or Gather that reads it.
        names: What it can be called in a pattern: by its node, by its weight, and by its place.
        source: The float initializer.
        num_outputs: N, or the vocabulary.
        num_inputs: M, or the hidden size.
        rows: `rows(start, stop)` is float [stop - start, num_inputs].
    """

    node: ir.Node
    names: tuple[str, ...]
    source: ir.Value
    num_outputs: int
    num_inputs: int
    rows: Rows

    @property
    def name(self) -> str:
        """The name for messages and for the new initializers."""
        return self.names[0]

    @property
    def dtype(self) -> ir.DataType:
        """Of the float weight."""
        assert self.source.const_value is not None
        return self.source.const_value.dtype

    @property
    def is_lookup(self) -> bool:
        """Whether this is the embedding, of which a step reads few rows."""
        return self.node.op_type == "Gather"


def find_projections(graph: ir.Graph) -> list[Projection]:
    """Return every projection and embedding with a float weight, in graph order.

    Raises:
        QuantError: The graph is quantized already.
    """
    quantized = next((n for n in graph if (n.domain, n.op_type) in _QUANTIZED), None)
    if quantized is not None:
        raise QuantError(
            f"the model is already quantized: node '{node_label(quantized)}' is {quantized.op_type}; "
            "start from the float model, and name one quantization pass only"
        )
    head = _last_projection(graph)
    return [projection for node in graph for projection in _projections(node, head)]


def _projections(node: ir.Node, head: ir.Node | None) -> Iterator[Projection]:
    found = _embedding(node) if node.op_type == "Gather" else _linear(node)
    if found is None:
        return
    source, transposed = found
    tensor = source.const_value
    assert tensor is not None
    first, second = (int(d) for d in tensor.shape.numpy())
    names = tuple(dict.fromkeys(name for name in (node_label(node), source.name or "", _place(node, head)) if name))
    if transposed:

        def rows(start: int, stop: int) -> np.ndarray:
            return rows_of(tensor, start, stop)

        yield Projection(node, names, source, first, second, rows)
    else:

        def columns(start: int, stop: int) -> np.ndarray:
            return columns_of(tensor, start, stop)

        yield Projection(node, names, source, second, first, columns)


def _place(node: ir.Node, head: ir.Node | None) -> str:
    """Return the name of the place in a decoder, which graphs of every exporter share; empty for the others."""
    if node.op_type == "Gather":
        return EMBEDDING
    before = node.inputs[0].producer() if node.inputs[0] is not None else None
    if before is not None and before.domain == DOMAIN and before.op_type in _AFTER:
        return _AFTER[before.op_type]
    return HEAD if node is head else ""


def _linear(node: ir.Node) -> tuple[ir.Value, bool] | None:
    """Return the weight of a projection and whether it is stored [N, M]."""
    if (node.domain, node.op_type) not in {("", "MatMul"), (DOMAIN, "Linear")}:
        return None
    weight = node.inputs[1]
    if _is_float_matrix(weight):
        assert weight is not None
        return weight, False
    transpose = weight.producer() if weight is not None else None
    if transpose is None or transpose.op_type != "Transpose" or not _is_float_matrix(transpose.inputs[0]):
        return None
    assert transpose.inputs[0] is not None
    return transpose.inputs[0], True


def _embedding(node: ir.Node) -> tuple[ir.Value, bool] | None:
    """Return the table of a Gather that the token numbers index."""
    axis = node.attributes.get("axis")
    if node.domain or (axis is not None and axis.as_int() != 0) or not _is_float_matrix(node.inputs[0]):
        return None
    assert node.inputs[0] is not None
    indices = node.inputs[1]
    while indices is not None and indices.producer() is not None and indices.producer().op_type == "Cast":  # type: ignore[union-attr]
        indices = indices.producer().inputs[0]  # type: ignore[union-attr]
    return (node.inputs[0], True) if indices is not None and indices.name == "input_ids" else None


def _is_float_matrix(value: ir.Value | None) -> bool:
    tensor = value.const_value if value is not None else None
    return tensor is not None and len(tensor.shape) == 2 and tensor.dtype in _FLOATS


def _last_projection(graph: ir.Graph) -> ir.Node | None:
    """Return the projection from which the logits come, through whatever adds to or casts them."""
    value = next((v for v in graph.outputs if v.name == "logits"), None)
    while value is not None and (node := value.producer()) is not None:
        if _linear(node) is not None:
            return node
        value = node.inputs[0] if node.inputs else None
    return None
