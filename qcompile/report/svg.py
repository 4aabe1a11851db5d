"""A picture as SVG text. Every name comes from an untrusted file and is escaped here."""

from __future__ import annotations

from html import escape

from qcompile.report.drawing import Box, Drawing
from qcompile.report.layout import LABEL_WIDTH, Line, Picture, Rectangle
from qcompile.report.numbers import printable
from qcompile.report.words import ROLE_WORDS, VALUE_WORDS

_CORNER = 6.0


def section_svg(drawing: Drawing, picture: Picture, section: int) -> str:
    """Return one section as an `<svg>` element; `section` is its number on the page."""
    size = f'width="{picture.width:.0f}" height="{picture.height:.0f}"'
    box = f'viewBox="0 0 {picture.width:.1f} {picture.height:.1f}"'
    parts = [f'<svg class="dag" data-section="{section}" {size} {box} role="img">']
    for lane in picture.lanes:
        area = lane.area
        if lane.num_ops == 0:
            continue
        bar = _rect(Rectangle(area.x, area.y, 4.0, area.height))
        parts.append(
            f'<g class="lane r-{lane.role.value}"><rect {_rect(area)} rx="7"/>'
            f'<rect class="bar" {bar} rx="2"/>'
            f"{_lane_label(lane.role.value, lane.num_ops, area)}</g>"
        )
    parts += [
        f'<path class="wire" data-a="{line.source}" data-b="{line.target}" d="{_path(line)}"/>'
        for line in picture.lines
    ]
    places = enumerate(zip(drawing.boxes, picture.boxes, strict=True))
    parts += [_box(index, drawn, area) for index, (drawn, area) in places]
    return "".join((*parts, "</svg>"))


def _lane_label(role: str, num_ops: int, area: Rectangle) -> str:
    english, chinese = ROLE_WORDS[role]
    middle = area.y + area.height / 2
    count_y = middle + 14 if area.height > 40 else middle + 4
    name_y = middle - 1 if area.height > 40 else middle + 4
    count_x = area.x + 13 if area.height > 40 else area.x + LABEL_WIDTH - 8
    anchor = "start" if area.height > 40 else "end"
    return (
        f'<text class="role" x="{area.x + 13:.1f}" y="{name_y:.1f}">{_both_tspans(english, chinese)}</text>'
        f'<text class="count" x="{count_x:.1f}" y="{count_y:.1f}" text-anchor="{anchor}">{num_ops}</text>'
    )


def _both_tspans(english: str, chinese: str) -> str:
    return f'<tspan lang="en">{escape(english)}</tspan><tspan lang="zh">{escape(chinese)}</tspan>'


def _box(index: int, box: Box, area: Rectangle) -> str:
    title, subtitle = escape(printable(box.title)), escape(printable(box.subtitle))
    is_word = box.kind in {"in", "out"} and box.title in VALUE_WORDS
    shown = _both_tspans(box.title, VALUE_WORDS[box.title]) if is_word else title
    node = "" if box.node is None else f' data-n="{box.node}"'
    tensor = f' data-t="{escape(printable(box.tensor))}"' if box.tensor else ""
    middle = area.x + area.width / 2
    radius = area.height / 2 if box.kind in {"in", "out"} else 5
    title_y = area.y + area.height / 2 + 4 if not subtitle else area.y + 16
    second = f'<text class="sub" x="{middle:.1f}" y="{area.y + 29:.1f}">{subtitle}</text>' if subtitle else ""
    return (
        f'<g class="box {box.kind} r-{box.role.value}" data-i="{index}"{node}{tensor}>'
        f"<title>{title} {subtitle}{escape(printable(box.tensor))}</title>"
        f'<rect {_rect(area)} rx="{radius:.1f}"/>'
        f'<text x="{middle:.1f}" y="{title_y:.1f}">{shown}</text>{second}</g>'
    )


def _rect(area: Rectangle) -> str:
    return f'x="{area.x:.1f}" y="{area.y:.1f}" width="{area.width:.1f}" height="{area.height:.1f}"'


def _path(line: Line) -> str:
    x, y = line.start
    parts = [f"M{x:.1f} {y:.1f}"]
    steps = list(line.steps)
    for number, (kind, to_x, to_y) in enumerate(steps):
        if kind == "S" and abs(to_x - x) > 0.5:
            bend = (to_y - y) / 2
            parts.append(f"C{x:.1f} {y + bend:.1f} {to_x:.1f} {to_y - bend:.1f} {to_x:.1f} {to_y:.1f}")
        elif kind == "R" and number + 1 < len(steps):
            parts.append(_corner((x, y), (to_x, to_y), steps[number + 1][1:]))
        else:
            parts.append(f"L{to_x:.1f} {to_y:.1f}")
        x, y = to_x, to_y
    return "".join(parts)


def _corner(before: tuple[float, float], at: tuple[float, float], after: tuple[float, float]) -> str:
    """Return a line towards a corner and a curve around it."""

    def towards(end: tuple[float, float]) -> tuple[float, float]:
        distance = abs(end[0] - at[0]) + abs(end[1] - at[1])
        part = min(_CORNER, distance / 2) / distance if distance else 0.0
        return at[0] + (end[0] - at[0]) * part, at[1] + (end[1] - at[1]) * part

    (x1, y1), (x2, y2) = towards(before), towards(after)
    return f"L{x1:.1f} {y1:.1f}Q{at[0]:.1f} {at[1]:.1f} {x2:.1f} {y2:.1f}"
