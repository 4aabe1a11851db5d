"""Bring a graph of opset 11 to 17 to opset 18, in which the fused operators are defined.

    ReduceX(x; axes), Squeeze(x; axes), Unsqueeze(x; axes)    -> axes become an input
    Split(x; split), Split(x)                                 -> split becomes an input, or num_outputs is said
    Softmax(x; axis) of opset 11, 12                          -> over one axis; flattened first where it meant several
    Dropout(x; ratio)                                         -> Dropout(x)

Operators whose definition has not changed, or only grown, stay as they are. If one node cannot be converted, the whole
graph stays at its opset, with the reason. Later opsets than 18 are left alone: the definitions hold in them too.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir

from qcompile.functions import MIN_OPSET
from qcompile.fused_op import MIN_IR_VERSION
from qcompile.passes.base import Pass, PassContext, PassResult, Rejection
from qcompile.passes.change import finish_rewrites, named_constant
from qcompile.passes.matching import node_label
from qcompile.passes.proof import Rewrite

OLDEST_OPSET = 11
_STANDARD = {"", "ai.onnx"}
_SOFTMAX_OPS = {"Softmax", "LogSoftmax", "Hardmax"}
# Attributes that became inputs; what else reads them is unchanged.
_AXES_OPS = {
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare", "Squeeze", "Unsqueeze",
}  # fmt: skip


class NormalizeOpset(Pass):
    """Opset 11 to 17 -> 18."""

    name = "normalize-opset"
    summary = "opset 11 to 17 -> 18"

    def call(self, context: PassContext, result: PassResult) -> None:
        """Convert every node that opset 18 writes differently, or say which one cannot be."""
        model = context.model
        opset = model.graph.opset_imports.get("")
        if opset is None or opset >= MIN_OPSET:
            return
        nodes = [n for n in model.graph.all_nodes() if n.domain in _STANDARD]
        result.matches = 1
        reason, culprit = _obstacle(nodes, opset)
        if reason:
            result.rejected.append(Rejection(culprit, self.name, f"{reason}; the graph stays at opset {opset}"))
            return
        converted = {node: new for node in nodes if (new := _convert(node, opset, context))}
        refusal = _disproof(converted, opset, context, result)
        if refusal:
            result.rejected.append(Rejection("graph", self.name, f"rolled back: {refusal}"))
            return
        for node, new_nodes in converted.items():
            _replace(node, new_nodes)
        model.graph.opset_imports[""] = MIN_OPSET
        model.ir_version = max(model.ir_version, MIN_IR_VERSION)
        result.rewrites = 1
        result.detail["converted"] = len(converted)
        context.forget_analysis()
        finish_rewrites(context)


def _obstacle(nodes: list[ir.Node], opset: int) -> tuple[str, str]:
    """Return (why, which node) when a graph cannot be converted; two empty strings when it can."""
    if opset < OLDEST_OPSET:
        return f"opsets before {OLDEST_OPSET} are not converted; export the model again with opset 18", "graph"
    for node in nodes:
        reason = "" if _converter(node, opset) is not None else _incompatible(node, opset)
        if reason:
            return f"{node.op_type}: {reason}", node_label(node)
    return "", ""


def _incompatible(node: ir.Node, opset: int) -> str:
    """Compare an operator's definition in both opsets; empty when the newer one reads the node as the older does."""
    try:
        old = onnx.defs.get_schema(node.op_type, opset, "")
        new = onnx.defs.get_schema(node.op_type, MIN_OPSET, "")
    except onnx.defs.SchemaError:
        return f"not an operator of opset {opset}"
    if old.since_version == new.since_version:
        return ""
    if new.deprecated:
        return f"opset {MIN_OPSET} has it no longer"
    if any(name not in new.attributes for name in node.attributes):
        return (
            f"attribute {next(n for n in node.attributes if n not in new.attributes)} has gone from opset {MIN_OPSET}"
        )
    if node.op_type == "BatchNormalization" and len(node.outputs) > 1:
        return "training outputs have gone"
    if len(node.inputs) < new.min_input or len(node.outputs) > new.max_output:
        return f"opset {MIN_OPSET} takes other inputs or gives other outputs"
    return ""


def _converter(node: ir.Node, opset: int) -> Callable[[ir.Node, PassContext], list[ir.Node]] | None:
    """Return what rewrites this node for opset 18, or None when nothing needs to be rewritten."""
    if node.op_type in _AXES_OPS:
        since = 13 if node.op_type in {"ReduceSum", "Squeeze", "Unsqueeze"} else 18
        return _axes_to_input if opset < since else None
    if node.op_type == "Split":
        return _split if len(node.inputs) < 2 or node.inputs[1] is None else None
    if node.op_type in _SOFTMAX_OPS and opset < 13:
        return _softmax
    if node.op_type == "Dropout" and "ratio" in node.attributes:
        return _dropout
    return None


def _convert(node: ir.Node, opset: int, context: PassContext) -> list[ir.Node]:
    converter = _converter(node, opset)
    return converter(node, context) if converter is not None else []


def _axes_to_input(node: ir.Node, context: PassContext) -> list[ir.Node]:
    attributes = dict(node.attributes)
    axes = attributes.pop("axes", None)
    inputs = list(node.inputs[:1])
    if axes is not None:
        numbers = [int(n) for n in axes.as_ints()]
        name = "axes." + "_".join(str(n) if n >= 0 else f"last{-n}" for n in numbers)
        inputs.append(named_constant(context.model.graph, name, np.array(numbers, dtype=np.int64)))
    return [ir.node(node.op_type, inputs, attributes)]


def _split(node: ir.Node, context: PassContext) -> list[ir.Node]:
    attributes = dict(node.attributes)
    sizes = attributes.pop("split", None)
    inputs = list(node.inputs[:1])
    if sizes is None:
        attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))
    else:
        numbers = [int(n) for n in sizes.as_ints()]
        name = "split." + "x".join(map(str, numbers))
        inputs.append(named_constant(context.model.graph, name, np.array(numbers, dtype=np.int64)))
    return [ir.node("Split", inputs, attributes, num_outputs=len(node.outputs))]


def _softmax(node: ir.Node, context: PassContext) -> list[ir.Node]:
    """Before opset 13 all axes from `axis` on were one."""
    x, axis = node.inputs[0], node.attributes.get("axis")
    first = axis.as_int() if axis is not None else 1
    specs = context.analysis.specs(x) if x is not None else None
    rank = (
        len(specs[0].shape) if specs is not None else (len(x.shape) if x is not None and x.shape is not None else None)
    )
    if first == -1 or (rank is not None and first == rank - 1):
        return [ir.node(node.op_type, [x], {"axis": -1})]
    flat = ir.node("Flatten", [x], {"axis": first})
    softmax = ir.node(node.op_type, [flat.outputs[0]], {"axis": -1})
    shape = ir.node("Shape", [x])
    return [flat, softmax, shape, ir.node("Reshape", [softmax.outputs[0], shape.outputs[0]])]


def _dropout(node: ir.Node, context: PassContext) -> list[ir.Node]:
    del context
    return [ir.node("Dropout", list(node.inputs[:1]), num_outputs=len(node.outputs))]


def _disproof(converted: dict[ir.Node, list[ir.Node]], opset: int, context: PassContext, result: PassResult) -> str:
    """Run each converted node of the main graph in both opsets; empty when they agree.

    Nodes in subgraphs, and behind operators that cannot be inferred, are not run: what attribute became which input
    does not hang on their shapes.
    """
    if context.prover is None:
        return ""
    for node, new_nodes in converted.items():
        is_known = all(v is None or context.analysis.specs(v) is not None for v in node.inputs)
        if node.graph is not context.model.graph or not is_known:
            continue
        outputs = [v for v in node.outputs if v.name != ""]
        rewrite = Rewrite([node], outputs, new_nodes, new_nodes[-1].outputs[: len(outputs)], opsets=(opset, MIN_OPSET))
        proof = context.prover.prove(rewrite, context.analysis)
        if not proof.holds:
            return f"'{node_label(node)}' {proof.reason}"
        result.proved += 1
        result.max_error = max(result.max_error, proof.error)
    return ""


def _replace(node: ir.Node, new_nodes: list[ir.Node]) -> None:
    graph = node.graph
    assert graph is not None
    last = new_nodes[-1]
    last.name = node.name
    for new, old in zip(last.outputs, node.outputs, strict=True):
        if old.name == "":
            new.name = ""
    ir.convenience.replace_nodes_and_values(graph, node, [node], new_nodes, node.outputs, last.outputs)
