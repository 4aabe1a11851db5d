"""The page's numbers: totals, operators, weights, fused functions, passes, inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from qcompile.report.numbers import compact_count, human_bytes, human_change, printable
from qcompile.report.panel import Panel
from qcompile.report.roles import Role
from qcompile.report.summary import ModelSummary
from qcompile.report.terminal import group_by_layer
from qcompile.report.words import ROLE_WORDS, both


def totals(summaries: Sequence[ModelSummary], num_layers: Sequence[int]) -> str:
    """Return the cards at the top: nodes, operator types, parameters, weight bytes, layers, target."""
    cards = [
        _card(("Nodes", "节点"), [s.num_nodes for s in summaries], "{:,}".format),
        _card(("Operator types", "算子种类"), [len(s.ops) for s in summaries], "{:,}".format),
        _card(("Parameters", "参数量"), [s.parameters for s in summaries], compact_count),
        _card(("Weights", "权重大小"), [s.weight_bytes for s in summaries], human_bytes),
        _card(("Layers", "层数"), num_layers, "{:,}".format),
    ]
    fused = [sum(count for op, count in s.ops.items() if "::" in op) for s in summaries]
    if any(fused):
        cards.append(_card(("Fused operators", "融合算子"), fused, "{:,}".format))
    return f'<div class="totals">{"".join(cards)}</div>'


def _card(words: tuple[str, str], values: Sequence[int], show: Callable[[int], str]) -> str:
    figure = "<i>→</i>".join(f"<b>{escape(show(value))}</b>" for value in values)
    change = human_change(*values) if len(values) > 1 else ""
    sign = "less" if change.startswith("−") else "more" if change.startswith("+") else "same"
    shown = _change_words(change)
    tail = f'<span class="change {sign}">{shown}</span>' if change else ""
    return f'<div class="total"><span>{both(*words)}</span><p>{figure}</p>{tail}</div>'


def _change_words(change: str) -> str:
    words = {"=": ("same", "不变"), "new": ("new", "新增"), "gone": ("gone", "消失")}
    return both(*words[change]) if change in words else escape(change)


def operators(summaries: Sequence[ModelSummary], labels: Sequence[str]) -> str:
    """Return the operator histogram, two bars per operator when there are two models."""
    names = {name: max(s.ops.get(name, 0) for s in summaries) for s in summaries for name in s.ops}
    most = max(names.values(), default=1)
    rows = []
    for name in sorted(names, key=lambda n: (-names[n], n)):
        counts = [s.ops.get(name, 0) for s in summaries]
        bars = "".join(
            f'<span class="bar b{i}"><i style="width:{100 * count / most:.2f}%"></i><em>{count or "–"}</em></span>'
            for i, count in enumerate(counts)
        )
        domain, separator, op = printable(name).rpartition("::")
        shown = f"{escape(op)} <small>{escape(domain)}</small>" if separator else escape(op)
        marker = " own" if separator else ""
        rows.append(f'<div class="row{marker}"><span class="label">{shown}</span><span>{bars}</span></div>')
    return _section(("Operators", "算子"), f'{_keys(labels)}<div class="histogram">{"".join(rows)}</div>')


def _keys(labels: Sequence[str]) -> str:
    if len(labels) == 1:
        return ""
    keys = "".join(f'<span class="key b{i}"><i></i>{escape(label)}</span>' for i, label in enumerate(labels))
    return f'<p class="keys">{keys}</p>'


def weights(panels: Sequence[Panel], labels: Sequence[str]) -> str:
    """Return where the bytes are: one bar per model by role, and a table by dtype."""
    most = max((sum(p.bytes_by_role.values()) for p in panels), default=0)
    if most == 0:
        return ""
    bars = []
    for panel, label in zip(panels, labels, strict=True):
        parts = "".join(_part(role, size, size / most) for role, size in panel.bytes_by_role.items())
        bars.append(f'<div class="stack"><span class="label">{escape(label)}</span><div>{parts}</div></div>')
    return _section(("Where the bytes are", "权重分布"), "".join(bars) + _dtype_table(panels, labels))


def _part(role: Role, size_bytes: int, share: float) -> str:
    words, size = both(*ROLE_WORDS[role.value]), human_bytes(size_bytes)
    text = f"<b>{words}</b> {size}" if share > 0.04 else ""
    hint = f"{ROLE_WORDS[role.value][0]} {ROLE_WORDS[role.value][1]} {size}"
    return f'<span class="part r-{role.value}" style="width:{100 * share:.3f}%" title="{hint}">{text}</span>'


def _dtype_table(panels: Sequence[Panel], labels: Sequence[str]) -> str:
    head = (("dtype", "类型"), ("tensors", "张量数"), ("elements", "元素数"), ("bytes", "字节数"))
    rows = []
    for panel, label in zip(panels, labels, strict=True):
        for dtype, total in panel.summary.weights.items():
            cells = (f"{total.tensors:,}", compact_count(total.elements), human_bytes(total.size_bytes))
            name = f"<td>{escape(label)}</td>" if len(panels) > 1 else ""
            rows.append(f"<tr>{name}<td>{escape(dtype)}</td>{''.join(f'<td class=n>{c}</td>' for c in cells)}</tr>")
    first = "<th></th>" if len(panels) > 1 else ""
    columns = "".join(f"<th>{both(*words)}</th>" for words in head)
    return f"<table><thead><tr>{first}{columns}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def functions(summaries: Sequence[ModelSummary], labels: Sequence[str]) -> str:
    """Return the functions each model defines, with their number of calls."""
    parts = []
    for summary, label in zip(summaries, labels, strict=True):
        chips = "".join(
            f'<span class="function"><small>{escape(printable(f.domain))}</small> {escape(printable(f.name))}'
            f"<b>×{f.calls}</b></span>"
            for f in summary.functions
        )
        if chips:
            parts.append(f"<h3>{escape(label)}</h3><p>{chips}</p>")
    return _section(("Functions", "函数"), "".join(parts)) if parts else ""


def passes(summaries: Sequence[ModelSummary], labels: Sequence[str]) -> str:
    """Return what the manifest says of every pass that ran."""
    parts = []
    for summary, label in zip(summaries, labels, strict=True):
        if summary.passes:
            rows = "".join(_pass_row(record) for record in summary.passes)
            head = "".join(
                f"<th>{both(*words)}</th>"
                for words in (
                    ("pass", "优化项"),
                    ("matches", "匹配"),
                    ("rewrites", "改写"),
                    ("proved", "已验证"),
                    ("largest error", "最大误差"),
                    ("rejected", "拒绝"),
                )
            )
            parts.append(f"<h3>{escape(label)}</h3><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>")
    return _section(("Passes", "优化过程"), "".join(parts)) if parts else ""


def _pass_row(record: dict[str, Any]) -> str:
    rejected = record.get("rejected") or []
    reasons = "".join(
        f"<li>{escape(printable(str(r.get('node', ''))))}: {escape(printable(str(r.get('reason', ''))))}</li>"
        for r in rejected
        if isinstance(r, dict)
    )
    refused = f"<details><summary>{len(rejected)}</summary><ul>{reasons}</ul></details>" if rejected else "0"
    cells = [record.get("matches", ""), record.get("rewrites", ""), record.get("proved", "")]
    error = record.get("max_error")
    cells.append(f"{error:.1e}" if isinstance(error, float) and error else "")
    shown = "".join(f"<td class=n>{escape(str(cell))}</td>" for cell in cells)
    idle = "" if record.get("rewrites") else ' class="idle"'
    return f"<tr{idle}><td>{escape(printable(str(record.get('name', ''))))}</td>{shown}<td>{refused}</td></tr>"


def interface(summaries: Sequence[ModelSummary], labels: Sequence[str]) -> str:
    """Return inputs and outputs; those that differ in the layer number alone share a row."""
    parts = []
    for summary, label in zip(summaries, labels, strict=True):
        rows = []
        for words, ports in ((("in", "输入"), summary.inputs), (("out", "输出"), summary.outputs)):
            for name, dtype, shape in group_by_layer(ports):
                cells = "".join(f"<td>{escape(printable(text))}</td>" for text in (name, dtype, shape))
                rows.append(f"<tr><td>{both(*words)}</td>{cells}</tr>")
        parts.append(f"<div><h3>{escape(label)}</h3><table><tbody>{''.join(rows)}</tbody></table></div>")
    return _section(("Inputs and outputs", "输入与输出"), f'<div class="panels n{len(labels)}">{"".join(parts)}</div>')


def _section(words: tuple[str, str], content: str) -> str:
    return f'<section class="chart"><h2>{both(*words)}</h2>{content}</section>'
