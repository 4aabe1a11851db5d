"""The HTML report: one self-contained page, no network, names escaped, English and Chinese.

The graph is drawn per layer as SVG by `svg.py`; `page.css` and `page.js` are put inline. Everything can be
read with scripts switched off; the script adds tooltips, the choice of layer, language and theme.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompile import __version__
from qcompile.errors import ArtifactError
from qcompile.report import charts
from qcompile.report.layers import Place
from qcompile.report.numbers import human_bytes, printable
from qcompile.report.panel import DrawnSection, Panel, make_panel, tooltips
from qcompile.report.roles import Role
from qcompile.report.summary import ModelSummary
from qcompile.report.svg import section_svg
from qcompile.report.terminal import column_labels
from qcompile.report.words import ROLE_WORDS, both
from qcompile.weights_writer import write_failure

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def write_page(read: Sequence[tuple[ir.Model, ModelSummary]], path: Path) -> None:
    """Write the page for one model, or for two side by side.

    Raises:
        ArtifactError: The page cannot be written; an older one is left as it was.
    """
    text = page_html([make_panel(model, summary) for model, summary in read])
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise ArtifactError(write_failure(path, error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def page_html(panels: Sequence[Panel]) -> str:
    """Return the page."""
    labels = column_labels([panel.summary for panel in panels])
    labels = labels if len(panels) > 1 else [Path(printable(panels[0].summary.path)).name]
    numbered = [(p, [(first + i, s) for i, s in enumerate(p.sections)]) for p, first in _first_numbers(panels)]
    data = [tooltips(section.section) for _, sections in numbered for _, section in sections]
    summaries = [panel.summary for panel in panels]
    body = [
        _header(labels),
        charts.totals(summaries, [panel.num_layers for panel in panels]),
        _legend(panels),
        f'<main class="panels n{len(panels)}">',
        *(_panel(p, label, s) for (p, s), label in zip(numbered, labels, strict=True)),
        "</main>",
        charts.operators(summaries, labels),
        charts.weights(panels, labels),
        charts.functions(summaries, labels),
        charts.passes(summaries, labels),
        charts.interface(summaries, labels),
        f"<footer>qcompile {escape(__version__)}</footer>",
    ]
    return _document(" | ".join(labels), "\n".join(part for part in body if part), data)


def _document(title: str, body: str, data: list[dict[str, Any]]) -> str:
    files = resources.files("qcompile.report")
    style = (files / "page.css").read_text(encoding="utf-8")
    script = (files / "page.js").read_text(encoding="utf-8")
    embedded = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for unsafe in "<>&\u2028\u2029":
        embedded = embedded.replace(unsafe, f"\\u{ord(unsafe):04x}")
    return (
        '<!doctype html>\n<html lang="en" data-lang="en" data-theme="auto">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} · qcompile inspect</title>\n<style>\n{style}</style>\n</head>\n"
        f'<body>\n{body}\n<div id="tip" role="tooltip" hidden></div>\n'
        f'<script type="application/json" id="data">{embedded}</script>\n'
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _first_numbers(panels: Sequence[Panel]) -> list[tuple[Panel, int]]:
    first, numbered = 0, []
    for panel in panels:
        numbered.append((panel, first))
        first += len(panel.sections)
    return numbered


def _header(labels: Sequence[str]) -> str:
    names = '<span class="arrow">→</span>'.join(f"<b>{escape(label)}</b>" for label in labels)
    return (
        f'<header><div class="name"><span class="mark">qcompile inspect</span><h1>{names}</h1></div>'
        '<div class="tools"><button id="language" type="button"><span lang="en">中文</span>'
        '<span lang="zh">English</span></button><button id="theme" type="button">'
        f"{both('Theme', '主题')}</button></div></header>"
    )


def _legend(panels: Sequence[Panel]) -> str:
    used = {stage.role for panel in panels for section in panel.sections for stage in section.stages}
    chips = "".join(
        f'<button type="button" class="chip r-{role.value}" data-role="{role.value}">'
        f"<i></i>{both(*ROLE_WORDS[role.value])}</button>"
        for role in Role
        if role in used
    )
    hint = both(
        "Point at a box for its shapes and bytes; pick a layer by its number.",
        "将鼠标移到方框上查看形状与字节数；点击层号选择该层。",
    )
    return f'<nav class="legend">{chips}<span class="hint">{hint}</span></nav>'


def _panel(panel: Panel, label: str, sections: Sequence[tuple[int, DrawnSection]]) -> str:
    largest = max((len(s.section.indices), -n) for n, s in sections) if sections else (0, 0)
    cards = [
        _card(section, number, is_open=len(section.section.indices) == largest[0] and -number == largest[1])
        for number, section in sections
    ]
    return (
        f'<section class="panel"><h2>{escape(label)} <small>{panel.summary.num_nodes:,} '
        f"{both('nodes', '个节点')}</small></h2>{_map(sections)}{''.join(cards)}</section>"
    )


def _map(sections: Sequence[tuple[int, DrawnSection]]) -> str:
    """Return the strip of all layers; those that are alike share a colour and open the same card."""
    cells: dict[int, str] = {}
    shade = 0
    for number, section in sections:
        for position, index in enumerate(section.section.indices):
            cells[index] = (
                f'<button type="button" class="cell g{shade % 6}" data-section="{number}" '
                f'data-layer="{position}">{index}</button>'
            )
        shade += bool(section.section.indices)
    return f'<div class="map">{"".join(cells[i] for i in sorted(cells))}</div>' if cells else ""


def _card(drawn: DrawnSection, number: int, *, is_open: bool) -> str:
    section = drawn.section
    count = len(section.indices)
    times = f'<span class="times">×{count}</span>' if count > 1 else ""
    ops = f"{len(section.nodes[0]):,} {both('ops', '个算子')}"
    weight = f" · {human_bytes(drawn.weight_bytes)}" if drawn.weight_bytes else ""
    each = both(" each", "（每层）") if count > 1 else ""
    stacked = " stacked" if count > 1 else ""
    state = " open" if is_open else ""
    return (
        f'<details class="card {section.place.value}{stacked}" data-section="{number}"{state}>'
        f'<summary><span class="title">{_title(drawn)}{times}</span>'
        f'<span class="size">{ops}{weight}{each}</span>'
        f'<span class="stages">{_stage_strip(drawn)}</span></summary>'
        f'<div class="chosen" hidden></div>{_picture(drawn, number)}{_control(drawn)}</details>'
    )


def _title(drawn: DrawnSection) -> str:
    section = drawn.section
    if section.place is Place.LAYER:
        ranges = index_ranges(section.indices)
        word = both("Layer", "第") if len(section.indices) == 1 else both("Layers", "第")
        return f"{word} {ranges}" + '<span lang="zh"> 层</span>'
    names = {
        Place.BEFORE: ("Before the layers", "各层之前"),
        Place.AFTER: ("After the layers", "各层之后"),
        Place.WHOLE: ("Graph", "计算图"),
    }
    return both(*names[section.place])


def index_ranges(indices: Sequence[int]) -> str:
    """Return numbers as ranges: `0, 2–5, 23`."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and parts[-1][-1] == index - 1:
            parts[-1] = [parts[-1][0], index]
        else:
            parts.append([index])
    return ", ".join("–".join(str(i) for i in part) for part in parts)


def _stage_strip(drawn: DrawnSection) -> str:
    return "".join(
        f'<span class="stage r-{stage.role.value}">{both(*ROLE_WORDS[stage.role.value])}<b>{stage.num_ops}</b></span>'
        for stage in drawn.stages
    )


def _picture(drawn: DrawnSection, number: int) -> str:
    if drawn.drawing is None or drawn.picture is None:
        rows = "".join(
            f"<li>{both(*ROLE_WORDS[stage.role.value])}: {escape(printable(_counted(stage.ops)))}</li>"
            for stage in drawn.stages
        )
        note = both("Too large to draw; the operators are:", "规模过大，不绘制；算子如下：") if rows else ""
        return f'<div class="undrawn">{note}<ul>{rows}</ul></div>'
    return f'<div class="canvas">{section_svg(drawn.drawing, drawn.picture, number)}</div>'


def _control(drawn: DrawnSection) -> str:
    if not drawn.control_ops:
        return ""
    count = sum(drawn.control_ops.values())
    words = both(
        f"+ {count:,} nodes of shape arithmetic and constants, not drawn",
        f"另有 {count:,} 个形状运算与常量节点未绘制",
    )
    listed = escape(printable(_counted(drawn.control_ops)))
    return f'<details class="control"><summary>{words}</summary><p>{listed}</p></details>'


def _counted(ops: dict[str, int]) -> str:
    return " · ".join(f"{name} ×{count}" if count > 1 else name for name, count in ops.items())
