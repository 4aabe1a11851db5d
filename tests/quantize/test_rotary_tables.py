"""Rotary tables that are computed at load are the tables that were stored."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.ort import run_session
from qcompile.passes.base import PassContext
from qcompile.passes.lower_rotary_tables_to_ort import LowerRotaryTablesToOrt


def tables(length, theta=1e6, factor=1.0, width=32):
    frequencies = (1.0 / theta ** (np.arange(width, dtype=np.float32) / width)).astype(np.float32)
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies
    return (np.cos(angles) * np.float32(factor)), (np.sin(angles) * np.float32(factor))


def graph_with(cos, sin):
    values = []
    for name, array in (("cos", cos), ("sin", sin)):
        kind = ir.TensorType(ir.DataType.FLOAT)
        values.append(
            ir.Value(name=name, type=kind, shape=ir.Shape(array.shape), const_value=ir.tensor(array, name=name))
        )
    inputs = [ir.Value(name=f"i{i}") for i in range(7)]
    node = ir.node("GroupQueryAttention", [*inputs, *values], domain="com.microsoft")
    node.outputs[0].name = "y"
    graph = ir.Graph(
        inputs, node.outputs, nodes=[node], initializers=values, opset_imports={"": 18, "com.microsoft": 1}
    )
    return PassContext(ir.Model(graph, ir_version=9))


def computed(context):
    node = next(n for n in context.model.graph if n.op_type == "GroupQueryAttention")
    made = [n for n in context.model.graph if n is not node]
    outputs = [ir.Value(name=f"o{i}") for i in range(2)]
    ends = [ir.Node("", "Identity", [v], outputs=[o]) for v, o in zip(node.inputs[7:9], outputs, strict=True)]
    constants = {v.name: v for n in made for v in n.inputs if v.const_value is not None}
    context.model.graph.remove(node)
    for n in made:
        context.model.graph.remove(n)
    graph = ir.Graph([], outputs, nodes=[*made, *ends], opset_imports={"": 18}, name="tables")
    for value in constants.values():
        context.model.graph.initializers.pop(value.name)
        graph.register_initializer(value)
    return run_session({}, ir.to_proto(ir.Model(graph, ir_version=9)).SerializeToString(), {})


@pytest.mark.parametrize(("length", "theta", "factor"), [(32768, 1e6, 1.0), (4096, 1e4, 1.0), (131072, 1e6, 1.1386294)])
def test_they_come_back_to_rounding(length, theta, factor):
    cos, sin = tables(length, theta, factor)
    context = graph_with(cos, sin)
    result = LowerRotaryTablesToOrt()(context)
    assert result.rewrites == 1, result.rejected
    seen = computed(context)
    np.testing.assert_allclose(seen[0], cos, atol=3e-6)
    np.testing.assert_allclose(seen[1], sin, atol=3e-6)


def test_what_is_no_line_of_angles_stays():
    cos, sin = tables(4096)
    cos[3000:] = cos[:1096]
    result = LowerRotaryTablesToOrt()(graph_with(cos, sin))
    assert result.rewrites == 0
    assert "not positions times frequencies" in result.rejected[0].reason


def test_short_tables_stay():
    assert LowerRotaryTablesToOrt()(graph_with(*tables(512))).rewrites == 0
