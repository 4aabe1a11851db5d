"""Plots as SVG: lines on a logarithmic or linear axis, and bars. Colours come from `page.css` or stand alone.

Every number that is drawn is also in a tooltip (`<title>`), and nothing needs a script.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 760, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 22, 44
COLOURS = ("#3457d5", "#d1386b", "#2c8a4b", "#b7791f", "#0f8a8a", "#8a4fd0")
_STYLE = (
    "text{font:11px system-ui,sans-serif;fill:currentColor}.g{stroke:currentColor;stroke-opacity:.14}"
    ".t{font-size:12px;font-weight:600}.l{fill:none;stroke-width:1.8}.m{stroke-dasharray:5 4;stroke:currentColor}"
)


@dataclass(frozen=True)
class Line:
    """One curve: a name and a y for every x (None where there is no number)."""

    name: str
    values: Sequence[float | None]


@dataclass(frozen=True)
class Bar:
    """One bar: its label, its length, what is written at its end, and a mark (a floor, a limit) if there is one."""

    label: str
    value: float
    text: str
    mark: float | None = None


def line_plot(
    title: str, x_title: str, x_labels: Sequence[str], lines: Sequence[Line], *, log: bool, limit: float | None = None
) -> str:
    """Return curves over evenly spaced x.

    Args:
        title: Above the plot.
        x_title: Below the axis.
        x_labels: One per x; thinned out when there are many.
        lines: The curves.
        log: Logarithmic y; values of zero or less are drawn at the bottom.
        limit: A dashed line across.
    """
    numbers = [v for line in lines for v in line.values if v is not None and math.isfinite(v)]
    axis = _Axis.log([*numbers, *([limit] if limit else [])]) if log else _Axis.linear(numbers)
    count = max(len(x_labels), 1)
    xs = [_LEFT + (i + 0.5) * (WIDTH - _LEFT - _RIGHT) / count for i in range(count)]
    body = [_heading(title, x_title), axis.grid()]
    step = max(1, math.ceil(count / 16))
    body += [_text(xs[i], HEIGHT - _BOTTOM + 15, x_labels[i], "middle") for i in range(0, len(x_labels), step)]
    if limit is not None:
        y = axis.y(limit)
        body.append(f'<line class="m" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for number, line in enumerate(lines):
        body.append(_curve(line, xs, x_labels, axis, COLOURS[number % len(COLOURS)]))
    body.append(_keys([line.name for line in lines]))
    return _svg(title, body, HEIGHT)


def column_plot(title: str, x_title: str, labels: Sequence[str], counts: Sequence[int]) -> str:
    """Return a histogram with one column per label."""
    axis = _Axis.linear([float(c) for c in counts])
    width = (WIDTH - _LEFT - _RIGHT) / max(len(counts), 1)
    body = [_heading(title, x_title), axis.grid()]
    for i, (label, count) in enumerate(zip(labels, counts, strict=True)):
        x, y = _LEFT + i * width, axis.y(count)
        body.append(
            f'<rect x="{x + 1:.1f}" y="{y:.1f}" width="{max(width - 2, 1):.1f}" height="{HEIGHT - _BOTTOM - y:.1f}" '
            f'fill="{COLOURS[0]}"><title>{escape(label)}: {count}</title></rect>'
        )
        if i % max(1, math.ceil(len(counts) / 12)) == 0:
            body.append(_text(x + width / 2, HEIGHT - _BOTTOM + 15, label, "middle"))
    return _svg(title, body, HEIGHT)


def bar_plot(title: str, bars: Sequence[Bar], *, unit: str) -> str:
    """Return horizontal bars, each with its number, and a mark where it could be at best."""
    height = _TOP + 14 + 24 * len(bars) + 26
    left, right = 190, 150
    longest = max([1e-12, *(max(b.value, b.mark or 0.0) for b in bars)])
    scale = (WIDTH - left - right) / longest
    body = [_text(8, 14, title, "start", "t"), _text(WIDTH - right, height - 8, unit, "end")]
    for i, bar in enumerate(bars):
        y = _TOP + 8 + 24 * i
        end = left + bar.value * scale
        body.append(_text(left - 8, y + 12, bar.label, "end"))
        body.append(
            f'<rect x="{left}" y="{y}" width="{max(bar.value * scale, 0.5):.1f}" height="16" rx="3" '
            f'fill="{COLOURS[0]}"><title>{escape(bar.label)}: {escape(bar.text)}</title></rect>'
        )
        if bar.mark is not None:
            x = left + bar.mark * scale
            end = max(end, x)
            body.append(f'<line class="m" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 3}" y2="{y + 19}"/>')
        body.append(_text(end + 6, y + 12, bar.text, "start"))
    return _svg(title, body, height)


@dataclass(frozen=True)
class _Axis:
    """A y axis: the range, its ticks, and whether it is logarithmic."""

    low: float
    high: float
    ticks: tuple[float, ...]
    is_log: bool

    @classmethod
    def log(cls, values: Sequence[float]) -> _Axis:
        positive = [v for v in values if v > 0] or [1.0]
        low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
        high = max(high, low + 1)
        step = max(1, math.ceil((high - low) / 6))
        return cls(low, high, tuple(10.0**e for e in range(low, high + 1, step)), is_log=True)

    @classmethod
    def linear(cls, values: Sequence[float]) -> _Axis:
        high = max([0.0, *values]) or 1.0
        step = 10 ** math.floor(math.log10(high))
        step = next(s for s in (step / 5, step / 2, step, 2 * step) if high / s <= 6)
        count = math.ceil(high / step)
        return cls(0.0, count * step, tuple(i * step for i in range(count + 1)), is_log=False)

    def y(self, value: float) -> float:
        if self.is_log:
            value = math.log10(value) if value > 0 and math.isfinite(value) else (self.high if value > 0 else self.low)
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)

    def grid(self) -> str:
        lines = []
        for tick in self.ticks:
            y = self.y(tick)
            lines.append(f'<line class="g" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            lines.append(_text(_LEFT - 6, y + 4, f"{tick:.0e}" if self.is_log else f"{tick:g}", "end"))
        return "".join(lines)


def _curve(line: Line, xs: Sequence[float], labels: Sequence[str], axis: _Axis, colour: str) -> str:
    points = [(x, axis.y(v), v, at) for x, v, at in zip(xs, line.values, labels, strict=False) if v is not None]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in points)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{colour}">'
        f"<title>{escape(line.name)}, {escape(at)}: {v:.3g}</title></circle>"
        for x, y, v, at in points
    )
    return f'<polyline class="l" points="{path}" stroke="{colour}"/>{dots}'


def _heading(title: str, x_title: str) -> str:
    return _text(8, 14, title, "start", "t") + _text((WIDTH + _LEFT) / 2, HEIGHT - 8, x_title, "middle")


def _keys(names: Sequence[str]) -> str:
    keys, x = [], float(WIDTH - _RIGHT)
    for number in range(len(names) - 1, -1, -1):
        name = names[number]
        x -= 7.0 * len(name) + 26
        keys.append(f'<rect x="{x:.0f}" y="6" width="10" height="8" rx="2" fill="{COLOURS[number % len(COLOURS)]}"/>')
        keys.append(_text(x + 14, 14, name, "start"))
    return "".join(keys)


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(text)}</text>'


def _svg(title: str, body: Sequence[str], height: int) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(title, quote=True)}"><style>{_STYLE}</style>{"".join(body)}</svg>'
    )


def stacked(plots: Sequence[str]) -> str:
    """Return several plots as one SVG, below one another, on white."""
    heights = [int(plot.split('viewBox="0 0 ', 1)[1].split('"', 1)[0].split()[1]) for plot in plots]
    parts, y = [], 0
    for plot, height in zip(plots, heights, strict=True):
        parts.append(plot.replace("<svg ", f'<svg x="0" y="{y}" ', 1))
        y += height + 12
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" '
        f'color="#1c2230"><rect width="100%" height="100%" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )
