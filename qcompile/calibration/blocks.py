"""Cut a decoder graph into blocks that run one after the other, each with its own weights only.

A node belongs to block i + 1 when it depends on the KV cache of layer i and of none later. So block 0 ends before the
first attention, block i runs from the attention of layer i - 1 to the projections of layer i, and the last one ends at the
head. This holds for fused and unfused graphs and for every exporter, as nothing but the names of the cache inputs is used.
A node that depends on no input of the graph (a transposed weight) goes to the block that reads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qcompile.passes.excerpt import sort_nodes

_PAST = re.compile(r"past_key_values\.(\d+)\.(?:key|value)$")


@dataclass(frozen=True)
class Block:
    """Some nodes of a graph, what they read from before, and what is wanted of them.

    Attributes:
        nodes: In topological order.
        reads: Graph inputs and values of earlier blocks.
        weights: Initializers.
        writes: Values that later blocks read, or that were asked for.
        kept: Of everything produced so far, what later blocks still read.
    """

    nodes: tuple[ir.Node, ...]
    reads: tuple[ir.Value, ...]
    weights: tuple[ir.Value, ...]
    writes: tuple[ir.Value, ...]
    kept: frozenset[ir.Value]


def split_blocks(graph: ir.Graph, wanted: Iterable[ir.Value]) -> list[Block]:
    """Return the blocks that compute the wanted values and nothing else, in order; empty ones are left out."""
    targets = list(dict.fromkeys(wanted))
    nodes = _needed_nodes(graph, targets)
    level_of = _levels(graph, nodes)
    last_read: dict[ir.Value, int] = {}
    by_level: dict[int, list[ir.Node]] = {}
    for node in nodes:
        level = level_of[node]
        by_level.setdefault(level, []).append(node)
        for value in node.inputs:
            if value is not None:
                last_read[value] = max(last_read.get(value, 0), level)
    return [_block(level, by_level[level], last_read, targets) for level in sorted(by_level)]


def _block(level: int, nodes: Sequence[ir.Node], last_read: dict[ir.Value, int], targets: Sequence[ir.Value]) -> Block:
    produced = {v for n in nodes for v in n.outputs}
    outer = dict.fromkeys(v for n in nodes for v in n.inputs if v is not None and v not in produced)
    wanted = set(targets)
    return Block(
        tuple(nodes),
        tuple(v for v in outer if v.const_value is None),
        tuple(v for v in outer if v.const_value is not None),
        tuple(v for n in nodes for v in n.outputs if v in wanted or last_read.get(v, -1) > level),
        frozenset(v for v, last in last_read.items() if last > level),
    )


def _needed_nodes(graph: ir.Graph, targets: Sequence[ir.Value]) -> list[ir.Node]:
    needed: dict[ir.Node, None] = {}
    stack = [p for value in targets if (p := value.producer()) is not None]
    while stack:
        node = stack.pop()
        if node in needed:
            continue
        needed[node] = None
        stack.extend(p for v in node.inputs if v is not None and (p := v.producer()) is not None)
    return sort_nodes(node for node in graph if node in needed)


def _levels(graph: ir.Graph, nodes: Sequence[ir.Node]) -> dict[ir.Node, int]:
    """Return the block of every node; nodes without inputs of the graph take that of their first reader."""
    of_value: dict[ir.Value, int] = {value: _level_of_input(value) for value in graph.inputs}
    levels: dict[ir.Node, int] = {}
    for node in nodes:
        known = [of_value[v] for v in node.inputs if v is not None and v in of_value]
        if known:
            levels[node] = max(known)
            of_value.update(dict.fromkeys(node.outputs, levels[node]))
    for node in reversed(nodes):
        if node not in levels:
            readers = [levels[r] for v in node.outputs for r in v.consumers() if r in levels]
            levels[node] = min(readers, default=0)
    return levels


def _level_of_input(value: ir.Value) -> int:
    match = _PAST.match(value.name or "")
    return int(match.group(1)) + 1 if match else 0
