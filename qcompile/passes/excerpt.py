"""Cut nodes out of a graph as a small model of their own, so that ONNX Runtime can run just them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qcompile.functions import DOMAIN, DOMAIN_VERSION, FUSED_OPS, MIN_OPSET

HALF = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_IR_VERSION = 10


def sort_nodes(nodes: Iterable[ir.Node]) -> list[ir.Node]:
    """Return the nodes with producers before consumers; an explicit stack, as graphs are deep."""
    todo = dict.fromkeys(nodes)
    done: dict[ir.Node, None] = {}
    for node in todo:
        stack = [node]
        while stack:
            current = stack[-1]
            producers = (v.producer() for v in current.inputs if v is not None)
            missing = [p for p in producers if p is not None and p in todo and p not in done]
            if missing and current not in done:
                stack.extend(missing)
            else:
                done[stack.pop()] = None
    return list(done)


def outer_values(nodes: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> list[ir.Value]:
    """Return what the nodes and outputs read and do not produce, in the order of use, each once."""
    produced = {v for n in nodes for v in n.outputs}
    used = [v for n in nodes for v in n.inputs if v is not None and v not in produced]
    return list(dict.fromkeys([*used, *(v for v in outputs if v not in produced)]))


def model_of(
    nodes: Sequence[ir.Node],
    outputs: Sequence[ir.Value],
    stand_ins: Mapping[ir.Value, ir.Value],
    imports: Mapping[str, int],
    *,
    widens: bool = False,
) -> bytes:
    """Serialize copies of nodes, with neutral names: equal structures give equal bytes.

    Args:
        nodes: In topological order.
        outputs: What the model returns.
        stand_ins: For each of `outer_values` a constant, or else an input, of the model.
        imports: Operator sets of the graph.
        widens: float16 and bfloat16 in attributes become float32.
    """
    values: dict[ir.Value | None, ir.Value | None] = {None: None}
    values.update(stand_ins.items())
    copies = [_copy(node, values, index, widens=widens) for index, node in enumerate(nodes)]
    results = [ir.Value(name=f"y{index}") for index in range(len(outputs))]
    copies += [ir.Node("", "Identity", [values[v]], outputs=[y]) for v, y in zip(outputs, results, strict=True)]
    graph = ir.Graph(
        [v for v in stand_ins.values() if v.const_value is None],
        results,
        nodes=copies,
        initializers=[v for v in stand_ins.values() if v.const_value is not None],
        opset_imports={"": MIN_OPSET, **imports, DOMAIN: DOMAIN_VERSION, "com.microsoft": 1},
        name="excerpt",
    )
    proto = ir.to_proto(ir.Model(graph, ir_version=_IR_VERSION))
    called = {n.op_type for n in nodes if n.domain == DOMAIN}
    proto.functions.extend(FUSED_OPS[name].proto(graph.opset_imports[""]) for name in sorted(called))
    return bytes(proto.SerializeToString())


def _copy(node: ir.Node, values: dict[ir.Value | None, ir.Value | None], index: int, *, widens: bool) -> ir.Node:
    """Copy a node, reading and extending the map from old to new values; an absent output stays absent."""
    outputs = [ir.Value(name="" if v.name == "" else f"n{index}_{i}") for i, v in enumerate(node.outputs)]
    attributes = [_widened(node, a) if widens else a for a in node.attributes.values()]
    inputs = [values[v] for v in node.inputs]
    values.update(zip(node.outputs, outputs, strict=True))
    return ir.Node(node.domain, node.op_type, inputs, attributes, outputs=outputs, name=f"n{index}")


def _widened(node: ir.Node, attribute: ir.Attr) -> ir.Attr:
    if node.op_type == "Cast" and attribute.name == "to" and ir.DataType(attribute.as_int()) in HALF:
        return ir.AttrInt64("to", int(ir.DataType.FLOAT))
    if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in HALF:
        return ir.AttrTensor(attribute.name, ir.tensor(attribute.as_tensor().numpy().astype(np.float32)))
    return attribute
