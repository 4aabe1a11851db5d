"""A static graph in the making: every value has its type, every shape is known, one opset, no domain but the standard.

What the parser of CANN wants of a graph (one `opset_import` at opset 16, NPU operators in the empty domain, a
`value_info` for every value) is true by construction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

OPSET = 16
IR_VERSION = 8

Dims = tuple[int, ...]


class StaticGraph:
    """Nodes are appended in order; names are made unique here."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[ir.Node] = []
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self._initializers: dict[str, ir.Value] = {}
        self._names: dict[str, int] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Dims) -> ir.Value:
        """Declare an input."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str) -> None:
        """Make a value an output of that name."""
        producer = value.producer()
        if producer is None or any(value is other for other in self.outputs):
            value = self.op("Identity", [value], dims(value), name=name)
        value.name = name
        self.outputs.append(value)

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """Return a constant; one name is one constant."""
        return self.weight(name, ir.Tensor(array, name=name))

    def ints(self, *values: int) -> ir.Value:
        """Return an int64 vector: a shape, axes or sizes."""
        return self.constant(f"const.{'x'.join(map(str, values))}", np.array(values, dtype=np.int64))

    def weight(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """Return an initializer; one name is one tensor."""
        if name not in self._initializers:
            self._initializers[name] = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
            )
        return self._initializers[name]

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        shape: Dims,
        *,
        name: str,
        dtype: ir.DataType | None = None,
        more: Mapping[str, Any] | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """Append a node of one output; its dtype is that of the first input unless given.

        Args:
            op_type: Operator in the empty domain.
            inputs: Values; None for an optional input that is left out.
            shape: Of the output.
            name: Of the node, and of its output.
            dtype: Of the output.
            more: Attributes whose names are parameters here.
            attributes: All other attributes.
        """
        return self.ops(op_type, inputs, [shape], name=name, dtypes=[dtype], **{**attributes, **(more or {})})[0]

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        shapes: Sequence[Dims],
        *,
        name: str,
        dtypes: Sequence[ir.DataType | None] | None = None,
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """Append a node of several outputs."""
        node = ir.node(op_type, inputs, attributes, num_outputs=len(shapes), name=self._unique(name))
        first = inputs[0].dtype if inputs and inputs[0] is not None else None
        for index, (value, shape) in enumerate(zip(node.outputs, shapes, strict=True)):
            given = dtypes[index] if dtypes is not None else None
            value.name = f"{node.name}.{index}" if index else node.name
            value.type = ir.TensorType(given or first or ir.DataType.FLOAT)
            value.shape = ir.Shape(shape)
        self.nodes.append(node)
        return node.outputs

    def reshape(self, value: ir.Value, shape: Dims, name: str) -> ir.Value:
        """Reshape; a chain of reshapes becomes one, and none when nothing changes."""
        producer = value.producer()
        if producer is not None and producer.op_type == "Reshape" and producer.inputs[0] is not None:
            value = producer.inputs[0]
        if dims(value) == shape:
            return value
        return self.op("Reshape", [value, self.ints(*shape)], shape, name=name)

    def cast(self, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
        """Cast, unless the value has that type."""
        if value.dtype == dtype:
            return value
        return self.op("Cast", [value], dims(value), name=name, dtype=dtype, to=int(dtype))

    def split(self, value: ir.Value, sizes: Sequence[int], axis: int, name: str) -> Sequence[ir.Value]:
        """Split along an axis (not negative) into sizes."""
        whole = dims(value)
        shapes = [(*whole[:axis], size, *whole[axis + 1 :]) for size in sizes]
        return self.ops("Split", [value, self.ints(*sizes)], shapes, name=name, axis=axis)

    def model(self) -> ir.Model:
        """Return the model without what no output needs."""
        needed = _needed(self.nodes, self.outputs)
        for node in self.nodes:
            if node not in needed:
                for index in range(len(node.inputs)):
                    node.replace_input_with(index, None)
        used = {value for node in needed for value in node.inputs if value is not None}
        graph = ir.Graph(
            self.inputs,
            self.outputs,
            nodes=[node for node in self.nodes if node in needed],
            initializers=[value for value in self._initializers.values() if value in used],
            opset_imports={"": OPSET},
            name=self.name,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="qcompile")

    def _unique(self, name: str) -> str:
        count = self._names.get(name, 0)
        self._names[name] = count + 1
        return f"{name}_{count}" if count else name


def dims(value: ir.Value) -> Dims:
    """Return the shape of a value, all of whose dimensions are known."""
    assert value.shape is not None
    return tuple(int(d) for d in value.shape)  # type: ignore[arg-type]


def _needed(nodes: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> set[ir.Node]:
    wanted = {value.producer() for value in outputs}
    for node in reversed(nodes):
        if node in wanted:
            wanted.update(value.producer() for value in node.inputs if value is not None)
    return {node for node in nodes if node in wanted}
