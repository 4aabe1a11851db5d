"""One model on the page: its sections drawn, its stages listed, and what a tooltip says of every box."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from qcompile.report.drawing import Drawing, dim_text, draw_section, tensor_text
from qcompile.report.layers import Section, split_sections
from qcompile.report.layout import Picture, arrange
from qcompile.report.links import Links
from qcompile.report.numbers import human_bytes, printable
from qcompile.report.roles import Role, assign_roles
from qcompile.report.sorted_copy import sorted_copy
from qcompile.report.summary import ModelSummary, initializer_key, op_name

# Beyond this a picture is no longer looked at; the stages of the section are still listed.
MAX_DRAWN_BOXES = 500
_MAX_ATTRIBUTE_CHARS = 80


@dataclass(frozen=True)
class Stage:
    """A run of boxes of one role: how many operators, and how often each occurs."""

    role: Role
    ops: dict[str, int]

    @property
    def num_ops(self) -> int:
        """Operators of the stage."""
        return sum(self.ops.values())


@dataclass(frozen=True)
class DrawnSection:
    """A section with its picture (None when it is too large to draw)."""

    section: Section
    drawing: Drawing | None
    picture: Picture | None
    stages: tuple[Stage, ...]
    control_ops: dict[str, int]
    weight_bytes: int


@dataclass(frozen=True)
class Panel:
    """One model with everything the page shows of it."""

    summary: ModelSummary
    sections: tuple[DrawnSection, ...]
    bytes_by_role: dict[Role, int]

    @property
    def num_layers(self) -> int:
        """How many layers were recognised."""
        return sum(len(s.section.indices) for s in self.sections)


def make_panel(model: ir.Model, summary: ModelSummary) -> Panel:
    """Draw a model; its shapes are inferred on a copy."""
    copy = sorted_copy(model)
    links = Links(copy.graph)
    roles = assign_roles(copy.graph, links)
    sections = split_sections(links, roles)
    drawings = [_draw(section, roles, links) for section in sections]
    width = max((arrange(d).width for d in drawings if d is not None), default=0.0)
    drawn = []
    for section, drawing in zip(sections, drawings, strict=True):
        picture = arrange(drawing, width) if drawing is not None else None
        stages = _stages(section, drawing, roles)
        control = Counter(op_name(node) for node in section.control[0])
        weight_bytes = sum(_weights_of(section.nodes[0] + section.control[0]).values())
        drawn.append(DrawnSection(section, drawing, picture, stages, dict(control.most_common()), weight_bytes))
    return Panel(summary, tuple(drawn), _bytes_by_role(copy, roles))


def tooltips(section: Section) -> dict[str, Any]:
    """Return what the page's script needs to describe every node of every layer of a section."""
    return {
        "layers": list(section.indices),
        "ops": [_describe(node) for node in section.nodes[0]],
        "names": [[_names(node) for node in nodes] for nodes in section.nodes],
    }


def _draw(section: Section, roles: dict[ir.Node, Role], links: Links) -> Drawing | None:
    if not section.nodes[0] or len(section.nodes[0]) > MAX_DRAWN_BOXES:
        return None
    return draw_section(section, roles, links)


def _stages(section: Section, drawing: Drawing | None, roles: dict[ir.Node, Role]) -> tuple[Stage, ...]:
    """Return the stages in the order they are drawn; without a drawing, one per role."""
    if drawing is None:
        by_role: dict[Role, Counter[str]] = {}
        for node in section.nodes[0]:
            by_role.setdefault(roles[node], Counter())[op_name(node)] += 1
        return tuple(Stage(role, dict(ops)) for role, ops in by_role.items())
    lanes = [drawing.blocks()[block] for block in drawing.lane_order()]
    stages = []
    for lane in lanes:
        nodes = [section.nodes[0][n] for i in lane if (n := drawing.boxes[i].node) is not None]
        if nodes:
            stages.append(Stage(drawing.boxes[lane[0]].role, dict(Counter(op_name(n) for n in nodes))))
    return tuple(stages)


def _weights_of(nodes: Sequence[ir.Node]) -> dict[object, int]:
    """Return the bytes of the weights some nodes read, each tensor once."""
    sizes: dict[object, int] = {}
    for node in nodes:
        for value in node.inputs:
            if value is not None and value.const_value is not None and value.is_initializer():
                sizes[initializer_key(value.const_value)] = value.const_value.nbytes
    return sizes


def _bytes_by_role(model: ir.Model, roles: dict[ir.Node, Role]) -> dict[Role, int]:
    totals: Counter[Role] = Counter()
    seen: set[object] = set()
    for node in model.graph:
        for key, size_bytes in _weights_of([node]).items():
            if key not in seen:
                seen.add(key)
                totals[roles[node]] += size_bytes
    return {role: totals[role] for role in Role if totals[role]}


def _describe(node: ir.Node) -> dict[str, Any]:
    return {
        "op": printable(op_name(node)),
        "in": [_input_text(value) for value in node.inputs],
        "out": [printable(tensor_text(value)) + _activation_bytes(value) for value in node.outputs],
        "attrs": [[printable(name), _attribute_text(attribute)] for name, attribute in node.attributes.items()],
    }


def _input_text(value: ir.Value | None) -> list[str]:
    """Return [kind, text] of an input: ``w`` weight with its bytes, ``v`` computed value, ``-`` absent."""
    if value is None:
        return ["-", ""]
    if value.const_value is None:
        return ["v", printable(tensor_text(value))]
    tensor = value.const_value
    shape = ", ".join(str(dim) for dim in tensor.shape)
    text = f"{_dtype(tensor)} [{shape}] · {human_bytes(tensor.nbytes)}"
    return ["w", printable(text)]


def _dtype(tensor: ir.TensorProtocol) -> str:
    return tensor_text(ir.Value(type=ir.TensorType(tensor.dtype)))


def _activation_bytes(value: ir.Value) -> str:
    """Return the bytes of a value per unit of its symbolic dims: ` · 256 B × batch_size`."""
    if value.shape is None or value.dtype is None or value.dtype.bitwidth == 0:
        return ""
    static = math.prod(dim for dim in value.shape if isinstance(dim, int))
    symbols = [dim_text(dim) for dim in value.shape if not isinstance(dim, int)]
    size = human_bytes(math.ceil(static * value.dtype.bitwidth / 8))
    return printable(" · " + " × ".join([size, *(f"({s})" if " " in s else s for s in symbols)]))


def _attribute_text(attribute: ir.Attr) -> str:
    if attribute.is_ref():
        return f"@{printable(attribute.ref_attr_name or '')}"
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        text = str(tensor.numpy().tolist()) if tensor.size <= 8 else f"tensor {tensor.shape}"
    elif attribute.type in {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS}:
        text = "graph"
    else:
        text = str(attribute.value)
    return printable(text if len(text) <= _MAX_ATTRIBUTE_CHARS else text[: _MAX_ATTRIBUTE_CHARS - 1] + "…")


def _names(node: ir.Node) -> list[str]:
    """Return a node's name, then the names of its inputs."""
    inputs = [value.name or "" if value is not None else "" for value in node.inputs]
    return [printable(name) for name in (node.name or "", *inputs)]
