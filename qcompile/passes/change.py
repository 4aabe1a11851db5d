"""Apply one change to a graph: infer the new nodes, compare with the old ones, prove, and only then replace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as ir_passes
from onnx_ir import convenience

from qcompile.analysis import Analysis
from qcompile.errors import GraphError
from qcompile.functions import DOMAIN, DOMAIN_VERSION, FUSED_OPS, MIN_OPSET
from qcompile.passes import precision
from qcompile.passes.base import PassContext, PassResult, Rejection
from qcompile.passes.excerpt import sort_nodes
from qcompile.passes.matching import node_label
from qcompile.passes.proof import Rewrite


@dataclass(frozen=True)
class Change:
    """A rewrite with what is needed to apply it.

    Attributes:
        rule: Name for the report and for the new nodes' metadata.
        root: The new nodes are inserted after this node.
        rewrite: The two sides.
        new_initializers: Constants the new nodes read.
        rows_that_matter: Compare only rows that are tokens.
        rounds_literals: See `Prover.prove`.
        kept: Old nodes that stay because others read them.
        names: Names for the new nodes; by default they are derived from those of the old ones.
    """

    rule: str
    root: ir.Node
    rewrite: Rewrite
    new_initializers: Sequence[ir.Value] = ()
    rows_that_matter: bool = False
    rounds_literals: bool = False
    kept: tuple[ir.Node, ...] = ()
    names: tuple[str, ...] = ()


def apply_change(context: PassContext, result: PassResult, change: Change) -> bool:
    """Prove a change and apply it; a change that fails its proof is recorded as rejected and leaves no trace."""
    refusal = _refusal(context, result, change)
    if refusal:
        result.rejected.append(Rejection(node_label(change.root), change.rule, f"rolled back: {refusal}"))
        _forget(context.model.graph, change.rewrite.new_nodes)
        return False
    _replace(context, change)
    result.rewrites += 1
    return True


def finish_rewrites(context: PassContext) -> None:
    """Bring a rewritten graph in order: function definitions, dead nodes, topological order, unique names."""
    register_functions(context.model)
    ir_passes.RemoveUnusedNodesPass()(context.model)
    context.model.graph.sort()
    _fix_names(context.model)


def _fix_names(model: ir.Model) -> None:
    """Give every node and value a name of its own; an absent optional output keeps its empty name."""
    absent = [v for n in model.graph.all_nodes() for v in n.outputs if v.name == "" and not v.uses()]
    ir_passes.NameFixPass()(model)
    for value in absent:
        value.name = ""


def register_functions(model: ir.Model) -> None:
    """Give the model the definitions of exactly the fused operators it calls."""
    called = {n.op_type for n in model.graph.all_nodes() if n.domain == DOMAIN}
    for identifier in [i for i in model.functions if i[0] == DOMAIN and i[1] not in called]:
        del model.functions[identifier]
    for name in sorted(called & FUSED_OPS.keys()):
        FUSED_OPS[name].register(model)
    if not called:
        model.graph.opset_imports.pop(DOMAIN, None)


def shared_prefix(names: Sequence[str]) -> str:
    """Return the longest common leading part of dotted or slashed node names, `layers.0.attn` for its children."""
    if not names:
        return ""
    split = [name.replace("/", ".").strip(".").split(".") for name in names]
    parts = []
    for column in zip(*split, strict=False):
        if len(set(column)) > 1:
            break
        parts.append(column[0])
    return ".".join(parts)


def named_constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Return the graph's initializer of that name, made on first use; the name must say the value."""
    if name not in graph.initializers:
        dtype = ir.DataType.from_numpy(array.dtype)
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(array.shape), const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]


def static_dims(value: ir.Value) -> list[int]:
    """Return the dimensions of a value that has no symbolic one."""
    assert value.shape is not None
    return [int(d) for d in value.shape.numpy()]


def _refusal(context: PassContext, result: PassResult, change: Change) -> str:
    """Return why a change must not be applied; empty when its shapes, precision and numbers are those of before."""
    analysis, rewrite = context.analysis, change.rewrite
    new_nodes = sort_nodes(rewrite.new_nodes)
    analysis.update(new_nodes)
    opset = context.model.graph.opset_imports.get("", MIN_OPSET)
    if opset < MIN_OPSET and any(n.domain == DOMAIN for n in new_nodes):
        return f"fused operators need opset {MIN_OPSET}, the graph has {opset}; run normalize-opset first"
    for old, new in zip(rewrite.old_outputs, rewrite.new_outputs, strict=True):
        mismatch = _spec_mismatch(analysis, old, new)
        if mismatch:
            return mismatch
    before, after = (precision.float_bits(nodes, analysis) for nodes in (rewrite.old_nodes, new_nodes))
    refusal = precision.narrowed(before, after) or _disproof(context, result, change)
    if not refusal:
        for note in precision.widened(before, after):
            notes = result.detail.setdefault("widened", {})
            notes[note] = notes.get(note, 0) + 1
    return refusal


def _disproof(context: PassContext, result: PassResult, change: Change) -> str:
    if context.prover is None:
        return ""
    try:
        proof = context.prover.prove(
            change.rewrite,
            context.analysis,
            rows_that_matter=change.rows_that_matter,
            rounds_literals=change.rounds_literals,
        )
    except GraphError as error:
        return str(error)
    result.proved += 1
    result.max_error = max(result.max_error, proof.error if proof.holds else 0.0)
    return proof.reason


def _spec_mismatch(analysis: Analysis, old: ir.Value, new: ir.Value) -> str:
    """Compare what the analysis says of a value and of its replacement; empty when nothing contradicts."""
    before, after = analysis.specs(old), analysis.specs(new)
    if before is None or after is None:
        return ""
    for a, b in zip(before, after, strict=True):
        if a.dtype != b.dtype or a.shape != b.shape:
            return f"'{old.name}' is {a.dtype.name}{list(a.shape)} before and {b.dtype.name}{list(b.shape)} after"
    return ""


def detach(nodes: Sequence[ir.Node]) -> None:
    """Disconnect nodes that were never inserted, so that they do not count as users of their inputs."""
    for node in nodes:
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)


def _forget(graph: ir.Graph, new_nodes: Sequence[ir.Node]) -> None:
    """Leave no trace of nodes that were refused: neither uses nor constants made for them."""
    constants = {v for n in new_nodes for v in n.inputs if v is not None and v.const_value is not None}
    detach(new_nodes)
    for value in constants:
        is_registered = value.name is not None and graph.initializers.get(value.name) is value
        if is_registered and not value.uses() and not value.is_graph_output() and value not in graph.inputs:
            del graph.initializers[value.name or ""]


def _replace(context: PassContext, change: Change) -> None:
    graph, analysis, rewrite = context.model.graph, context.analysis, change.rewrite
    for initializer in change.new_initializers:
        initializer.name = _unused_name(graph, initializer.name or "constant")
        graph.initializers[initializer.name] = initializer
    name = shared_prefix([n.name for n in rewrite.old_nodes if n.name]) or change.root.name
    for index, new in enumerate(rewrite.new_nodes):
        derived = name if len(rewrite.new_nodes) == 1 else f"{name}.{new.op_type}_{index}"
        new.name = change.names[index] if change.names else derived
        new.metadata_props["qcompile.rule"] = change.rule
    for old, new_value in zip(rewrite.old_outputs, rewrite.new_outputs, strict=True):
        analysis.alias(new_value, old)
        new_value.type = old.type if old.type is not None else new_value.type
        new_value.shape = old.shape if old.shape is not None else new_value.shape
    gone = [n for n in rewrite.old_nodes if n not in change.kept]
    convenience.replace_nodes_and_values(
        graph, change.root, gone, rewrite.new_nodes, rewrite.old_outputs, rewrite.new_outputs
    )
    graph.opset_imports.setdefault(DOMAIN, DOMAIN_VERSION)


def _unused_name(graph: ir.Graph, name: str) -> str:
    if name not in graph.initializers:
        return name
    index = 1
    while f"{name}_{index}" in graph.initializers:
        index += 1
    return f"{name}_{index}"


__all__ = [
    "Change",
    "apply_change",
    "detach",
    "finish_rewrites",
    "named_constant",
    "node_label",
    "register_functions",
    "shared_prefix",
]
