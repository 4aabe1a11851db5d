"""A section of the graph as boxes, arrows and blocks: what is to be drawn, without coordinates."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from qcompile.report.layers import Section
from qcompile.report.links import Links
from qcompile.report.roles import Role
from qcompile.report.summary import STANDARD_DOMAINS, dtype_name

_LARGE_BYTES = 1024
_CACHE_NAME = re.compile(r"^(past|present)(?:_key_values)?[._]\d+[._](key|value)$")
_NOT_A_LEAF = re.compile(r"^(?:\d+|model|decoder|transformer|layers?|self_attn|attn|attention|mlp|.*_output_\d+|)$")

# ONNX Runtime keeps this kernel of its own in the standard domain.
_KERNELS = frozenset({"SimplifiedLayerNormalization"})
# Values that pass from layer to layer: they enter at the top and leave at the bottom of a picture.
STREAM_LABELS = frozenset({"hidden states", "feed-forward output", "attention output", "logits"})


@dataclass(frozen=True)
class Box:
    """One rectangle.

    Attributes:
        title: The operator, or the name of a value that enters or leaves.
        subtitle: Name and shape of the weight it holds, if any.
        role: Colour, and the block it belongs to.
        node: Position in the section's node lists; None for a value that enters or leaves.
        kind: ``op``, ``fused`` (function or kernel of another domain), ``in`` or ``out``.
        tensor: Of ``in`` and ``out`` boxes: name, dtype and shape in words.
    """

    title: str
    subtitle: str
    role: Role
    node: int | None
    kind: str
    tensor: str = ""


@dataclass
class Drawing:
    """Boxes in topological order, arrows between their positions, and the block of every box."""

    boxes: list[Box] = field(default_factory=list)
    arrows: list[tuple[int, int]] = field(default_factory=list)
    block_of: list[int] = field(default_factory=list)

    def blocks(self) -> list[list[int]]:
        """Return the positions of the boxes of each block."""
        blocks: list[list[int]] = [[] for _ in range(max(self.block_of, default=-1) + 1)]
        for position, block in enumerate(self.block_of):
            blocks[block].append(position)
        return blocks

    def block_arrows(self) -> list[tuple[int, int]]:
        """Return the arrows between blocks, each once."""
        pairs = ((self.block_of[a], self.block_of[b]) for a, b in self.arrows)
        return list(dict.fromkeys(pair for pair in pairs if pair[0] != pair[1]))

    def lane_order(self) -> list[int]:
        """Return the blocks from top to bottom: each before those it feeds, as close to them as possible."""
        count = max(self.block_of, default=-1) + 1
        arrows = self.block_arrows()
        late = [0] * count
        for _ in range(count):
            for a, b in arrows:
                late[a] = max(late[a], late[b] + 1)
        alone = set(range(count)) - {block for arrow in arrows for block in arrow}
        return sorted(range(count), key=lambda block: (block not in alone, -late[block], block))


def draw_section(section: Section, roles: dict[ir.Node, Role], links: Links) -> Drawing:
    """Return what to draw for a section, taking its first layer as the model of all."""
    builder = _Builder(section.nodes[0], roles, links)
    builder.add_boxes()
    drawing = builder.drawing
    drawing.block_of = _blocks(drawing.boxes, drawing.arrows)
    return drawing


class _Builder:
    """Makes the boxes of one layer, and those of the values that cross its border."""

    def __init__(self, nodes: Sequence[ir.Node], roles: dict[ir.Node, Role], links: Links) -> None:
        self.position = {node: index for index, node in enumerate(nodes)}
        self.links = links
        inside = set(nodes)
        self.nodes = [node for node in links.nodes if node in inside]
        self.roles = roles
        self.drawing = Drawing()
        self.box_of: dict[ir.Node, int] = {}
        self.entry_of: dict[tuple[ir.Value, Role], int] = {}

    def add_boxes(self) -> None:
        """Add a box per node, before it those of the values that enter, after all those that leave."""
        for node in self.nodes:
            sources = [s for value in self.links.inputs(node) if (s := self._source(value, node)) is not None]
            box = Box(
                node.op_type,
                _subtitle(node, self.roles[node]),
                self.roles[node],
                self.position[node],
                "op" if node.domain in STANDARD_DOMAINS and node.op_type not in _KERNELS else "fused",
            )
            self.box_of[node] = self._add(box)
            for source in dict.fromkeys(sources):
                self.drawing.arrows.append((source, self.box_of[node]))
        for node in self.nodes:
            for value in node.outputs:
                self._add_exit(node, value)

    def _add(self, box: Box) -> int:
        self.drawing.boxes.append(box)
        return len(self.drawing.boxes) - 1

    def _source(self, value: ir.Value, reader: ir.Node) -> int | None:
        """Return the box a value comes from, made if it enters here; None for weights and shapes."""
        if value.const_value is not None:
            return None
        producer = value.producer()
        if producer is not None and producer in self.box_of:
            return self.box_of[producer]
        if producer is not None and self.roles.get(producer) is Role.CONTROL:
            return None
        label, role = self._label(value), self.roles[reader]
        if label in STREAM_LABELS:
            role = Role.RESIDUAL
        if (value, role) not in self.entry_of:
            self.entry_of[value, role] = self._add(Box(label, "", role, None, "in", _named(value)))
        return self.entry_of[value, role]

    def _label(self, value: ir.Value) -> str:
        """Name a value that enters or leaves in words that fit every layer."""
        if value.is_graph_input() or value.is_graph_output():
            return _CACHE_NAME.sub(r"\1 \2", value.name or "")
        node = value.producer()
        while node is not None and self.roles.get(node) is Role.ROTARY and node.op_type not in {"Cos", "Sin"}:
            node = next((v.producer() for v in node.inputs if v is not None and v.producer() is not None), None)
        if node is not None and node.op_type in {"Cos", "Sin"}:
            return node.op_type.lower()
        producer = value.producer()
        role = self.roles.get(producer) if producer is not None else None
        labels = {
            Role.MASK: "mask",
            Role.ROTARY: "angles",
            Role.MLP: "feed-forward output",
            Role.OUTPUT: "attention output",
        }
        return labels.get(role, "hidden states") if role is not None else "hidden states"

    def _add_exit(self, node: ir.Node, value: ir.Value) -> None:
        outside = [
            reader
            for reader in self.links.readers_of(value)
            if reader not in self.box_of and self.roles.get(reader) is not Role.CONTROL
        ]
        if value.is_graph_output() or outside:
            label, role = self._label(value), self.roles[node]
            role = Role.RESIDUAL if label in STREAM_LABELS else role
            exit_box = Box(label, "", role, None, "out", _named(value))
            self.drawing.arrows.append((self.box_of[node], self._add(exit_box)))


def _named(value: ir.Value) -> str:
    return f"{value.name or ''} · {tensor_text(value)}"


def tensor_text(value: ir.Value) -> str:
    """Return dtype and shape of a value: `float32 [batch_size, 2, ?, 64]`."""
    dims = "?" if value.shape is None else ", ".join(dim_text(dim) for dim in value.shape)
    return f"{dtype_name(value.dtype)} [{dims}]" if value.shape is not None else dtype_name(value.dtype)


def dim_text(dim: int | ir.SymbolicDim) -> str:
    """Return one dim; symbols that shape inference made up are unknown."""
    text = str(dim) if isinstance(dim, int) else (dim.value or "?")
    return "?" if str(text).startswith("unk__") else str(text)


def leaf_name(node: ir.Node) -> str:
    """Return what the exporter calls a node, without its path: `q_proj`."""
    weights = [v.name or "" for v in node.inputs if v is not None and v.const_value is not None]
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    for text in (*re.findall(r"'([^']*)'", scopes)[-2:-1], node.name or "", *weights):
        parts = [p for p in re.split(r"[./:]", text) if p not in {"weight", "bias", "qweight"}]
        parts = [p for p in parts if not p.lower().startswith(node.op_type.lower())]
        if len(parts) > 1 and not _NOT_A_LEAF.match(parts[-1]):
            return parts[-1]
    return ""


def _subtitle(node: ir.Node, role: Role) -> str:
    """Return name, shape and (if not floating point) type of the largest weight a node reads."""
    if role in {Role.ATTENTION, Role.ROTARY}:  # tables of cosines, masks: not weights
        return ""
    weights = [v for v in node.inputs if v is not None and v.const_value is not None]
    if not weights:
        return ""
    if node.op_type == "MatMulNBits":
        bits, rows, columns = (node.attributes.get_int(key, 0) for key in ("bits", "K", "N"))
        return f"{leaf_name(node)} {rows}×{columns} int{bits}".strip()
    largest = max(weights, key=_nbytes)
    tensor = largest.const_value
    assert tensor is not None
    is_vector = len(tensor.shape) == 1 and tensor.size > 1 and tensor.dtype.is_floating_point()
    if tensor.nbytes <= _LARGE_BYTES and not is_vector:
        return ""
    shape = "×".join(str(d) for d in tensor.shape)
    kind = "" if tensor.dtype.is_floating_point() else f" {dtype_name(tensor.dtype)}"
    leaf = leaf_name(node) if len(tensor.shape) > 1 else ""
    return f"{leaf} {shape}{kind}".strip()


def _nbytes(value: ir.Value) -> int:
    return value.const_value.nbytes if value.const_value is not None else 0


def _blocks(boxes: Sequence[Box], arrows: Sequence[tuple[int, int]]) -> list[int]:
    """Group boxes of one role: first those joined by an arrow, then those that no path connects.

    Two groups that are also connected through a third stay apart: merging them would make a cycle.
    """
    group = list(range(len(boxes)))
    stream = {i for i, box in enumerate(boxes) if box.kind in {"in", "out"} and box.role is Role.RESIDUAL}
    for a, b in arrows:
        joined = boxes[a].role is boxes[b].role and not {a, b} & stream
        if joined and group[a] != group[b] and not _detour(group, arrows, group[a], group[b]):
            _merge(group, group[a], group[b])
    for first in range(len(boxes)):
        for second in range(first + 1, len(boxes)):
            a, b = group[first], group[second]
            alike = boxes[first].role is boxes[second].role and (
                boxes[first].kind == boxes[second].kind if first in stream else second not in stream
            )
            if a != b and alike and not _connected(group, arrows, a, b):
                _merge(group, a, b)
    numbers: dict[int, int] = {}
    return [numbers.setdefault(g, len(numbers)) for g in group]


def _merge(group: list[int], a: int, b: int) -> None:
    for index, value in enumerate(group):
        if value == max(a, b):
            group[index] = min(a, b)


def _detour(group: list[int], arrows: Sequence[tuple[int, int]], a: int, b: int) -> bool:
    """Whether a path leads from `a` to `b` through another group."""
    following = _following(group, arrows)
    return b in _reach(following, following.get(a, set()) - {b}) or a in _reach(following, {b})


def _connected(group: list[int], arrows: Sequence[tuple[int, int]], a: int, b: int) -> bool:
    following = _following(group, arrows)
    return b in _reach(following, {a}) or a in _reach(following, {b})


def _following(group: list[int], arrows: Sequence[tuple[int, int]]) -> dict[int, set[int]]:
    following: dict[int, set[int]] = {}
    for a, b in arrows:
        if group[a] != group[b]:
            following.setdefault(group[a], set()).add(group[b])
    return following


def _reach(following: dict[int, set[int]], start: Iterable[int]) -> set[int]:
    """Return the groups that lie after `start`."""
    reached: set[int] = set()
    frontier = list(start)
    while frontier:
        for target in following.get(frontier.pop(), ()):
            if target not in reached:
                reached.add(target)
                frontier.append(target)
    return reached
