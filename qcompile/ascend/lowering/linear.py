"""Projections: MatMul and Add for float weights, of which GE makes one kernel; quantized ones by their scheme."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from qcompile.ascend.lowering.folding import Foldings
from qcompile.ascend.lowering.quantized import QuantizedLinear, QuantizedLowering
from qcompile.ascend.lowering.static_graph import StaticGraph, dims
from qcompile.ascend.lowering.typed_weights import Factor, TypedWeights
from qcompile.errors import UnsupportedOpError
from qcompile.quantized_functions import EMBEDDINGS, QUANTIZED_LINEARS

Values = dict[ir.Value, ir.Value]


class Projections:
    """Appends the projections and quantized embeddings of one graph.

    Args:
        graph: The graph.
        weights: The weights of all graphs.
        foldings: What is folded into which.
        family: The chip's family.
        note: Called with the reason when something is spelled out.
    """

    def __init__(
        self, graph: StaticGraph, weights: TypedWeights, foldings: Foldings, family: str, note: Callable[[str], None]
    ) -> None:
        self.graph, self.weights, self.foldings = graph, weights, foldings
        self._quantized = QuantizedLowering(graph, weights, family, note)

    def lower(self, node: ir.Node, values: Values) -> bool:
        """Append a projection of x [B, S, M] or a quantized embedding; return False when the node is none."""
        if node.op_type == "Transpose":
            return True  # of a weight; its reader looks through it
        if node.op_type in EMBEDDINGS:
            values[node.outputs[0]] = self._embedding(node, values[_present(node.inputs[0])])
            return True
        if node.op_type not in {"MatMul", "Linear", *QUANTIZED_LINEARS}:
            return False
        if _present(node.inputs[0]).const_value is not None:
            values[node.outputs[0]] = self._from_the_left(node, values)
            return True
        x = values[_present(node.inputs[0])]
        if node in self.foldings.vocabulary:
            x = self._last_token(x)
        bias = self._bias(node)
        values[node.outputs[0]] = (
            self._quantized_linear(node, x, bias) if node.op_type in QUANTIZED_LINEARS else self._float(node, x, bias)
        )
        return True

    def _float(self, node: ir.Node, x: ir.Value, bias: ir.Value | None) -> ir.Value:
        weight, name = _present(node.inputs[1]), _name(node)
        if weight.const_value is None:
            y = self._by_rows(x, weight, name)
        else:
            tensor = self.weights.typed(weight.name or name, weight.const_value, self.foldings.of(node))
            shape = (*dims(x)[:-1], int(tensor.shape[1]))  # type: ignore[arg-type]
            y = self.graph.op("MatMul", [x, self.graph.weight(weight.name or name, tensor)], shape, name=name)
        return y if bias is None else self.graph.op("Add", [y, bias], dims(y), name=f"{name}.biased")

    def _from_the_left(self, node: ir.Node, values: Values) -> ir.Value:
        """Multiply a constant matrix [N, M] by x [.., M, K]: a rotation that stays in the graph."""
        weight, x, name = _present(node.inputs[0]), values[_present(node.inputs[1])], _name(node)
        assert weight.const_value is not None
        left = self.graph.weight(weight.name or name, self.weights.typed(weight.name or name, weight.const_value))
        return self.graph.op("MatMul", [left, x], (*dims(x)[:-2], dims(left)[0], dims(x)[-1]), name=name, dtype=x.dtype)

    def _by_rows(self, x: ir.Value, weight: ir.Value, name: str) -> ir.Value:
        """Multiply by the transpose of a stored matrix [N, M], such as a tied embedding, without a second copy of it."""
        transpose = weight.producer()
        table = transpose.inputs[0] if transpose is not None and transpose.op_type == "Transpose" else None
        if table is None or table.const_value is None:
            raise UnsupportedOpError(f"node '{name}' (MatMul) multiplies two activations; no lowering is known for it")
        stored = self.graph.weight(table.name or name, self.weights.typed(table.name or name, table.const_value))
        b, s, m = dims(x)
        n = dims(stored)[0]
        rows = self.graph.reshape(x, (b * s, m), f"{name}.rows")
        product = self.graph.op("Gemm", [rows, stored], (b * s, n), name=name, transB=1)
        return self.graph.reshape(product, (b, s, n), f"{name}.by_slot")

    def _quantized_linear(self, node: ir.Node, x: ir.Value, bias: ir.Value | None) -> ir.Value:
        name = _name(node)
        b, s, m = dims(x)
        third = _tensor(node, 3)
        is_static = node.op_type == "LinearW8A8Static"
        linear = QuantizedLinear(
            x=self.graph.reshape(x, (b * s, m), f"{name}.rows"),
            weight=_present_tensor(node, 1),
            table=_present(node.inputs[1]).name or name,
            scales=_present_tensor(node, 2),
            zero_points=None if is_static else third,
            step=third if is_static else None,
            block=node.attributes["block_size"].as_int() if "block_size" in node.attributes else 0,
            factor=self.foldings.of(node),
            bias=bias,
            name=name,
        )
        y = self._quantized.linear(node.op_type, linear)
        return self.graph.reshape(y, (b, s, dims(y)[1]), f"{name}.by_slot")

    def _embedding(self, node: ir.Node, ids: ir.Value) -> ir.Value:
        codes, scales = _present_tensor(node, 1), _present_tensor(node, 2)
        table = _present(node.inputs[1]).name or "embed"
        if node.op_type == "EmbeddingW8" and not self._head_is_float(node):
            return self._quantized.embedding(ids, codes, scales, _name(node), table)
        if node.op_type != "EmbeddingW8":
            self._quantized.note("EmbeddingW4: no operator unpacks 4 bits")
        return self._quantized.float_embedding(ids, codes, scales, _tensor(node, 3), _name(node), table)

    def _head_is_float(self, embedding: ir.Node) -> bool:
        """Whether a tied head has no kernel for the table, so that its floats are there to be looked up too."""
        codes = _present(embedding.inputs[1])
        n, m = (int(d) for d in _present_tensor(embedding, 1).shape.numpy())
        block = embedding.attributes["block_size"].as_int()
        heads = [node.op_type for node, _ in codes.uses() if node.op_type in QUANTIZED_LINEARS]
        return any(self._quantized.why_floats(op_type, n, m, block) for op_type in heads)

    def _bias(self, node: ir.Node) -> ir.Value | None:
        """Return the bias: that of a Linear, or of the Add behind a projection that is folded into it."""
        add = self.foldings.biases.get(node)
        source = _present(node.inputs[2]) if node.op_type == "Linear" else add
        if source is None:
            return None
        assert source.const_value is not None
        name = source.name or f"{_name(node)}.bias"
        factor: Factor | None = self.foldings.of(node)
        return self.graph.weight(name, self.weights.typed(name, source.const_value, factor))

    def _last_token(self, hidden: ir.Value) -> ir.Value:
        """Choose the row whose logits are wanted: `last_token_index` of a prefill chunk [1, S, D]."""
        index = next((value for value in self.graph.inputs if value.name == "last_token_index"), None)
        if index is None:
            return hidden
        b, _, d = dims(hidden)
        return self.graph.op("Gather", [hidden, index], (b, 1, d), name="last_token", axis=1)


def _name(node: ir.Node) -> str:
    return node.outputs[0].name if node.op_type in EMBEDDINGS and node.outputs[0].name else node.name or node.op_type


def _tensor(node: ir.Node, index: int) -> ir.TensorProtocol | None:
    value = node.inputs[index] if len(node.inputs) > index else None
    return value.const_value if value is not None else None


def _present_tensor(node: ir.Node, index: int) -> ir.TensorProtocol:
    tensor = _tensor(node, index)
    if tensor is None:
        raise UnsupportedOpError(f"node '{node.name}' ({node.op_type}): input {index} is no constant")
    return tensor


def _present(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value
