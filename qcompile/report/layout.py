"""Coordinates for a drawing: one lane per block, stacked in order, and lines between them.

Inside a lane boxes are layered (`layered.py`). A line to the next lane goes straight down; a line that skips
lanes (the residual stream, V around the rotary embedding) runs in a gutter at the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from qcompile.report.drawing import Box, Drawing
from qcompile.report.layered import Key, Layered, draw_layered
from qcompile.report.roles import Role

Point = tuple[float, float]

LABEL_WIDTH = 92.0
_PADDING = 9.0
_RANK_GAP = 12.0
_LANE_GAP = 18.0
_GUTTER_STEP = 9.0


@dataclass(frozen=True)
class Rectangle:
    """Left, top, width and height in CSS pixels."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Lane:
    """The band of one block: where it is, the role of its boxes, how many operators it holds."""

    area: Rectangle
    role: Role
    num_ops: int


@dataclass(frozen=True)
class Line:
    """A line between two boxes: a start, then steps `S` (curve), `L` (straight), `R` (round corner)."""

    source: int
    target: int
    start: Point
    steps: tuple[tuple[str, float, float], ...]


@dataclass
class Picture:
    """Everything that is drawn of a section, with coordinates."""

    width: float
    height: float
    boxes: list[Rectangle] = field(default_factory=list)
    lanes: list[Lane] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)


@dataclass
class _Band:
    """One lane while it is laid out."""

    members: list[int]
    layered: Layered
    heights: list[float]
    left: float
    right: float
    top: float = 0.0

    @property
    def height(self) -> float:
        return sum(self.heights) + _RANK_GAP * max(0, len(self.heights) - 1) + 2 * _PADDING

    def rank_top(self, rank: int) -> float:
        return self.top + _PADDING + sum(self.heights[:rank]) + _RANK_GAP * rank

    def shift(self, distance: float) -> None:
        self.layered.x = {key: x + distance for key, x in self.layered.x.items()}


def box_size(box: Box) -> tuple[float, float]:
    """Return width and height that hold the texts of a box."""
    title_pixels = 7.7 if box.kind == "fused" else 6.9
    longest = max(title_pixels * _text_units(box.title), 5.7 * _text_units(box.subtitle))
    if box.kind in {"in", "out"}:
        return longest + 22.0, 21.0
    return max(52.0, longest + 20.0), 37.0 if box.subtitle else 25.0


def _text_units(text: str) -> float:
    """Return the width of a text in Latin characters; Chinese ones count double."""
    return sum(1.0 if ord(c) < 0x2E80 else 1.9 for c in text)


def arrange(drawing: Drawing, least_width: float = 0.0) -> Picture:
    """Give every box, lane and line of a drawing its place, in a picture of at least this width."""
    sizes = [box_size(box) for box in drawing.boxes]
    order = drawing.lane_order()
    members = drawing.blocks()
    lane_of = {box: lane for lane, block in enumerate(order) for box in members[block]}
    bands = [_band(drawing, members[block], lane_of, sizes) for block in order]
    skips = _gutter_columns(drawing, lane_of)
    inner = max((band.right - band.left for band in bands), default=0.0)
    gutter = _GUTTER_STEP * (max(skips.values(), default=-1) + 1) + (5.0 if skips else 0.0)
    width = max(least_width, LABEL_WIDTH + inner + 2 * _PADDING + gutter)
    centre = (LABEL_WIDTH + width - gutter) / 2
    top = 1.0
    for band in bands:
        band.shift(centre - (band.left + band.right) / 2)
        band.top = top
        top += band.height + _LANE_GAP
    picture = Picture(width, top - _LANE_GAP + 1.0)
    _place_boxes(picture, drawing, bands, sizes)
    router = _Router(bands, lane_of, picture.boxes, skips, width - gutter + _GUTTER_STEP / 2)
    picture.lines = [router.line(source, target) for source, target in drawing.arrows]
    return picture


def _band(drawing: Drawing, members: list[int], lane_of: dict[int, int], sizes: Sequence[tuple[float, float]]) -> _Band:
    """Lay out the boxes of one block, with a point per outer box where its lines cross the border."""
    lane = lane_of[members[0]]
    links: dict[tuple[Key, Key], None] = {}
    for a, b in drawing.arrows:
        if lane_of[b] == lane:
            links[("box" if lane_of[a] == lane else "in", a), ("box", b)] = None
        elif lane_of[a] == lane:
            links[("box", a), ("out", a)] = None
    entries = list(dict.fromkeys(a for a, _ in links if a[0] == "in"))
    exits = list(dict.fromkeys(b for _, b in links if b[0] == "out"))
    widths: dict[Key, float] = dict.fromkeys(entries, 4.0)
    widths |= {("box", i): sizes[i][0] for i in members}
    widths |= dict.fromkeys(exits, 4.0)
    layered = draw_layered(widths, list(links), first=entries, last=exits)
    heights = [max((sizes[k[1]][1] for k in row if k[0] == "box"), default=0.0) for row in layered.rows]
    spans = [(layered.x[k] - w / 2, layered.x[k] + w / 2) for k, w in widths.items()]
    return _Band(members, layered, heights, min(s[0] for s in spans), max(s[1] for s in spans))


def _gutter_columns(drawing: Drawing, lane_of: dict[int, int]) -> dict[int, int]:
    """Return, per box with a line that skips lanes, the column of the gutter that line runs in."""
    last: dict[int, int] = {}
    for a, b in drawing.arrows:
        if lane_of[b] > lane_of[a] + 1:
            last[a] = max(last.get(a, 0), lane_of[b])
    columns: dict[int, int] = {}
    free_from: list[int] = []
    for source in sorted(last, key=lambda s: (lane_of[s], -last[s])):
        column = next((c for c, lane in enumerate(free_from) if lane <= lane_of[source]), len(free_from))
        free_from[column : column + 1] = [last[source]]
        columns[source] = column
    return columns


def _place_boxes(
    picture: Picture, drawing: Drawing, bands: Sequence[_Band], sizes: Sequence[tuple[float, float]]
) -> None:
    placed: dict[int, Rectangle] = {}
    for band in bands:
        for index in band.members:
            rank = band.layered.rank["box", index]
            width, height = sizes[index]
            y = band.rank_top(rank) + (band.heights[rank] - height) / 2
            placed[index] = Rectangle(band.layered.x["box", index] - width / 2, y, width, height)
        ops = sum(drawing.boxes[i].node is not None for i in band.members)
        area = Rectangle(0.5, band.top, picture.width - 1.0, band.height)
        picture.lanes.append(Lane(area, drawing.boxes[band.members[0]].role, ops))
    picture.boxes = [placed[index] for index in range(len(drawing.boxes))]


@dataclass
class _Router:
    """Draws the lines between boxes that have their places."""

    bands: Sequence[_Band]
    lane_of: dict[int, int]
    boxes: Sequence[Rectangle]
    skips: dict[int, int]
    right: float

    def line(self, source: int, target: int) -> Line:
        """Return the line from one box to another."""
        area = self.boxes[source]
        start = (area.x + area.width / 2, area.y + area.height)
        upper, lower = self.bands[self.lane_of[source]], self.bands[self.lane_of[target]]
        if upper is lower:
            return Line(source, target, start, tuple(self._inside(upper, ("box", source), ("box", target))))
        steps = self._inside(upper, ("box", source), ("out", source))
        entry_x = lower.layered.x["in", source]
        if self.lane_of[target] > self.lane_of[source] + 1:
            steps += self._through_gutter(source, steps[-1][1], upper, lower, entry_x)
        else:
            steps.append(("S", entry_x, lower.top))
        steps += self._inside(lower, ("in", source), ("box", target))
        return Line(source, target, start, tuple(steps))

    def _inside(self, band: _Band, source: Key, target: Key) -> list[tuple[str, float, float]]:
        """Return the steps after `source` that lead through the bends of a lane to `target`."""
        steps: list[tuple[str, float, float]] = []
        for key in band.layered.routes[source, target][1:]:
            x, rank = band.layered.x[key], band.layered.rank[key]
            if key[0] == "out":
                steps.append(("S", x, band.top + band.height))
            elif key[0] == "box":
                steps.append(("S", x, self.boxes[key[1]].y))
            else:
                steps.append(("S", x, band.rank_top(rank)))
                steps.append(("L", x, band.rank_top(rank) + band.heights[rank]))
        return steps

    def _through_gutter(
        self, source: int, x: float, upper: _Band, lower: _Band, entry_x: float
    ) -> list[tuple[str, float, float]]:
        column = self.skips[source]
        across = self.right + column * _GUTTER_STEP
        leave = upper.top + upper.height + 7.0 + 2.0 * (column % 3)
        enter = lower.top - 7.0 - 2.0 * (column % 3)
        return [
            ("R", x, leave),
            ("R", across, leave),
            ("R", across, enter),
            ("R", entry_x, enter),
            ("L", entry_x, lower.top),
        ]
