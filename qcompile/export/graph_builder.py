"""Build an onnx-ir graph node by node, every value named and typed."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

OPSET = 18
# the oldest IR version that has opset 18: older converters (ATC's among them) read it
IR_VERSION = 8

Dim = int | str | ir.SymbolicDim | None
Dims = Sequence[Dim]


def shape_of(value: ir.Value) -> list[Dim]:
    """Return the dimensions of a value this builder made."""
    return [] if value.shape is None else list(value.shape.dims)


class GraphBuilder:
    """Collects nodes, initializers, inputs and outputs of one graph.

    Node and value share a name: the node `layers.0.attn.q_proj` makes the value `layers.0.attn.q_proj`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._nodes: list[ir.Node] = []
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._initializers: dict[str, ir.Value] = {}

    def input(self, name: str, dtype: ir.DataType, dims: Dims) -> ir.Value:
        """Declare a graph input."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(dims))
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str) -> None:
        """Declare a value to be a graph output and give it that name."""
        value.name = name
        self._outputs.append(value)

    def weight(self, tensor: ir.TensorProtocol) -> ir.Value:
        """Add an initializer under the tensor's own name, or return the one that has it."""
        name = tensor.name or ""
        if name not in self._initializers:
            self._initializers[name] = ir.Value(
                name=name,
                type=ir.TensorType(tensor.dtype),
                shape=ir.Shape(tensor.shape.numpy()),
                const_value=tensor,
            )
        return self._initializers[name]

    def constant(self, name: str, values: float | Sequence[int] | np.ndarray, dtype: ir.DataType) -> ir.Value:
        """Add a small initializer; the same name means the same constant."""
        array = np.asarray(values, dtype=dtype.numpy())
        return self.weight(ir.Tensor(array, dtype=dtype, name=name))

    def shape_constant(self, name: str, dims: Sequence[int]) -> ir.Value:
        """Add an int64 vector (a target shape, axes, …)."""
        return self.constant(name, np.asarray(dims, np.int64), ir.DataType.INT64)

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        name: str,
        dims: Dims,
        *,
        dtype: ir.DataType | None = None,
        **attributes: int | float | str | Sequence[int],
    ) -> ir.Value:
        """Append a node with one output.

        Args:
            op_type: ONNX operator.
            inputs: Operands.
            name: Name of the node and of its output.
            dims: Shape of the output.
            dtype: Type of the output; the first operand's when not given.
            attributes: The node's attributes.
        """
        node = ir.node(op_type, list(inputs), attributes=attributes, name=name)
        value = node.outputs[0]
        value.name = name
        value.type = ir.TensorType(dtype or inputs[0].dtype or ir.DataType.UNDEFINED)
        value.shape = ir.Shape(dims)
        self._nodes.append(node)
        return value

    def cast(self, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
        """Append a Cast, unless the value already has the type."""
        if value.dtype == dtype:
            return value
        return self.op("Cast", [value], name, shape_of(value), dtype=dtype, to=int(dtype))

    def model(self, producer_version: str) -> ir.Model:
        """Return the finished model."""
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": OPSET},
            name=self.name,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="qcompile", producer_version=producer_version)
