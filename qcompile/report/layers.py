"""Cut a graph into what comes before the layers, the layers, and what comes after; group like layers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import onnx_ir as ir

from qcompile.report.links import Links
from qcompile.report.roles import Role
from qcompile.report.summary import op_name

_LAYER = re.compile(r"(?<![A-Za-z0-9])(?:layers?|h|blocks?)[./_](\d{1,4})(?![A-Za-z0-9])")
_CACHE = re.compile(r"^(?:past_key_values|present|past_key|past_value|past|present_key|present_value)[._](\d{1,4})")
_AFTER = re.compile(r"(?<![A-Za-z0-9_])(?:norm|final_norm|final_layernorm|ln_f|lm_head|embed_out)(?![A-Za-z0-9_])")
_SCOPES = "pkg.torch.onnx.name_scopes"
_PLAIN_ATTRIBUTES = frozenset(
    {
        ir.AttributeType.INT,
        ir.AttributeType.INTS,
        ir.AttributeType.FLOAT,
        ir.AttributeType.FLOATS,
        ir.AttributeType.STRING,
    }
)
_MAX_LAYERS = 4096
_MIN_NODES_TO_GUESS = 40


class Place(Enum):
    """Where a section lies; the value is its CSS class."""

    BEFORE = "before"
    LAYER = "layer"
    AFTER = "after"
    WHOLE = "whole"


@dataclass(frozen=True)
class Section:
    """A part of the graph that is drawn once.

    Attributes:
        place: Before the layers, a group of layers that are alike, after them, or the whole graph.
        indices: Layer numbers, in order; empty unless `place` is LAYER.
        nodes: Per layer its nodes to draw, position by position the same in every layer; outside of the
            layers one list.
        control: Per layer its nodes of shape arithmetic and constants, which are not drawn.
    """

    place: Place
    indices: tuple[int, ...]
    nodes: tuple[tuple[ir.Node, ...], ...]
    control: tuple[tuple[ir.Node, ...], ...]


def split_sections(links: Links, roles: dict[ir.Node, Role]) -> list[Section]:
    """Return the sections of a topologically sorted graph, in order; layers that are alike share one."""
    nodes = links.nodes
    layers = _assign_layers(links, roles)
    if not any(layer >= 0 for layer in layers.values()):
        drawn = [n for n in nodes if roles[n] is not Role.CONTROL]
        guessed = _repeats(drawn) if len(drawn) >= _MIN_NODES_TO_GUESS else None
        if guessed is None:
            return [_section(Place.WHOLE, (), [nodes], roles)]
        layers = _assign_by_repeats(links, drawn, guessed)
    return list(_sections(nodes, layers, roles))


def _sections(nodes: list[ir.Node], layers: dict[ir.Node, int], roles: dict[ir.Node, Role]) -> Iterator[Section]:
    by_layer: dict[int, list[ir.Node]] = {}
    for node in nodes:
        by_layer.setdefault(layers[node], []).append(node)
    if -1 in by_layer:
        yield _section(Place.BEFORE, (), [by_layer[-1]], roles)
    groups: dict[bytes, list[int]] = {}
    ordered: dict[int, list[ir.Node]] = {}
    for index in sorted(i for i in by_layer if 0 <= i < _MAX_LAYERS):
        drawn = [n for n in by_layer[index] if roles[n] is not Role.CONTROL]
        signature, ordered[index] = _signature(drawn, roles)
        groups.setdefault(signature, []).append(index)
    for indices in groups.values():
        control = [[n for n in by_layer[i] if roles[n] is Role.CONTROL] for i in indices]
        yield Section(
            Place.LAYER,
            tuple(indices),
            tuple(tuple(ordered[i]) for i in indices),
            tuple(tuple(c) for c in control),
        )
    if _MAX_LAYERS in by_layer:
        yield _section(Place.AFTER, (), [by_layer[_MAX_LAYERS]], roles)


def _section(place: Place, indices: tuple[int, ...], parts: list[list[ir.Node]], roles: dict[ir.Node, Role]) -> Section:
    drawn = tuple(tuple(n for n in part if roles[n] is not Role.CONTROL) for part in parts)
    control = tuple(tuple(n for n in part if roles[n] is Role.CONTROL) for part in parts)
    return Section(place, indices, drawn, control)


def _assign_layers(links: Links, roles: dict[ir.Node, Role]) -> dict[ir.Node, int]:
    """Return each node's layer: -1 before the layers, _MAX_LAYERS after them."""
    nodes = links.nodes
    layers: dict[ir.Node, int] = {}
    hinted: set[ir.Node] = set()
    for node in nodes:
        reached = max((layers[p] for p in links.producers(node)), default=-1)
        hint = _strong_hint(node)
        if hint is None and reached >= 0:
            hint = _weak_hint(node)
        if hint is not None:
            hinted.add(node)
        if roles[node] is Role.EMBEDDING:
            reached, hint = -1, None
        elif reached >= 0 and (hint is None or reached == _MAX_LAYERS) and _comes_after(node):
            reached = _MAX_LAYERS
        layers[node] = reached if hint is None or reached == _MAX_LAYERS else max(reached, hint)
    _pull_back([n for n in nodes if n not in hinted], layers, roles, links)
    for node in reversed(nodes):
        if layers[node] == -1 and roles[node] is not Role.EMBEDDING:
            layers[node] = _only_layer(node, layers, links)
    return layers


def _only_layer(node: ir.Node, layers: dict[ir.Node, int], links: Links) -> int:
    """Return the one layer that reads a node, when the node is constant or named after that layer."""
    readers = {layers[reader] for reader in links.readers(node)}
    if len(readers) != 1 or any(output.is_graph_output() for output in node.outputs):
        return -1
    (layer,) = readers
    is_constant = all(value.const_value is not None for value in links.inputs(node))
    return layer if is_constant or _weak_hint(node) == layer or layer == _MAX_LAYERS else -1


def _pull_back(nodes: list[ir.Node], layers: dict[ir.Node, int], roles: dict[ir.Node, Role], links: Links) -> None:
    """Move the unnamed beginning of a norm (Pow, ReduceMean, …) to the layer of the weight that ends it."""
    for node in reversed(nodes):
        readers = [layers[reader] for reader in links.readers(node)]
        computed = [v for v in links.inputs(node) if v.const_value is None]
        is_sum = node.op_type in {"Add", "MatMul", "Gemm"} and len(computed) > 1
        lowest = -1 if roles[node] is Role.NORM else 0
        movable = lowest <= layers[node] < _MAX_LAYERS and not is_sum
        if movable and readers and min(readers) > layers[node] and node.domain == "":
            layers[node] = min(readers)


def _strong_hint(node: ir.Node) -> int | None:
    """Return the layer that a weight, or a KV cache input or output, names."""
    for value in (*node.inputs, *node.outputs):
        if value is None or not value.name or node.op_type == "Shape":
            continue
        if value.is_graph_input() or value.is_graph_output():
            match = _CACHE.match(value.name)
        elif value.const_value is not None:
            match = _LAYER.search(value.name)
        else:
            continue
        if match:
            return int(match.group(1))
    return None


def _weak_hint(node: ir.Node) -> int | None:
    """Return the layer in a node's own name or scope; common subexpressions carry that of their first use."""
    for text in (node.metadata_props.get(_SCOPES, ""), node.name or ""):
        matches = _LAYER.findall(text)
        if matches:
            return int(matches[-1])
    return None


def _comes_after(node: ir.Node) -> bool:
    """Whether a node is named, or reads a weight named, after the final norm or the output head."""
    names = [v.name or "" for v in node.inputs if v is not None and v.const_value is not None]
    names += [node.metadata_props.get(_SCOPES, ""), node.name or ""]
    names += ["lm_head"] if any(o.is_graph_output() and o.name == "logits" for o in node.outputs) else []
    return any(_AFTER.search(name) and not _LAYER.search(name) for name in names)


def _signature(nodes: Sequence[ir.Node], roles: dict[ir.Node, Role]) -> tuple[bytes, list[ir.Node]]:
    """Return a digest of a layer's structure, and its nodes in an order that follows from it."""
    inside = set(nodes)
    digests: dict[ir.Node, bytes] = {}
    for node in nodes:
        parts = [op_name(node), roles[node].value, *(_shape_key(v) for v in node.outputs)]
        parts += [f"{a.name}={a.value}" for a in node.attributes.values() if a.type in _PLAIN_ATTRIBUTES]
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if producer in inside and producer is not None:
                parts.append(digests[producer].hex())
            elif value is not None and value.const_value is not None:
                parts.append(_shape_key(value))
            else:
                parts.append("outside" if value is not None else "none")
        digests[node] = hashlib.blake2b("\0".join(parts).encode(), digest_size=16).digest()
    ordered = sorted(range(len(nodes)), key=lambda i: (digests[nodes[i]], i))
    whole = hashlib.blake2b(b"".join(digests[nodes[i]] for i in ordered), digest_size=16).digest()
    return whole, [nodes[i] for i in ordered]


def _shape_key(value: ir.Value) -> str:
    shape = value.shape
    return "?" if shape is None else "x".join(str(d) if isinstance(d, int) else "n" for d in shape)


def _repeats(nodes: Sequence[ir.Node]) -> tuple[int, int, int] | None:
    """Find the run of operators that repeats over most of the graph: (start, period, count), or None."""
    kinds = {name: code for code, name in enumerate(sorted({op_name(n) for n in nodes}))}
    codes = np.array([kinds[op_name(n)] for n in nodes])
    best, covered = None, len(nodes) // 2
    for period in range(4, len(nodes) // 2 + 1):
        equal = np.concatenate(([0], (codes[:-period] == codes[period:]).astype(np.int8), [0]))
        edges = np.flatnonzero(np.diff(equal))
        for start, stop in edges.reshape(-1, 2):
            count = (stop - start) // period + 1
            if count >= 2 and count * period > covered:
                best, covered = (int(start), period, int(count)), count * period
    return best


def _assign_by_repeats(links: Links, drawn: Sequence[ir.Node], repeats: tuple[int, int, int]) -> dict[ir.Node, int]:
    start, period, count = repeats
    layers = {}
    for position, node in enumerate(drawn):
        layer = (position - start) // period
        layers[node] = -1 if position < start else _MAX_LAYERS if layer >= count else layer
    for node in reversed(links.nodes):
        if node not in layers:
            layers[node] = min((layers[reader] for reader in links.readers(node) if reader in layers), default=-1)
    return layers
