"""An .om file as tables, and as plain data for JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qcompile.ascend.om_fusions import judge_fusions
from qcompile.ascend.om_layout import MODEL_TYPES
from qcompile.ascend.om_reader import OmFile, OmModel, OmPort
from qcompile.report.numbers import human_bytes, printable

_MAX_ROWS = 60


def om_record(om: OmFile) -> dict[str, Any]:
    """Return plain data for JSON."""
    return {
        "path": str(om.path),
        "size_bytes": om.size_bytes,
        "header": asdict(om.header),
        "models": [_model_record(model) for model in om.models],
    }


def _model_record(model: OmModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "soc_version": model.soc_version,
        "partitions": [{"name": p.name, "offset": p.offset, "size_bytes": p.size_bytes} for p in model.partitions],
        "inputs": [asdict(port) for port in model.inputs],
        "outputs": [asdict(port) for port in model.outputs],
        "gears": [[list(shape) for shape in gear] for gear in model.gears],
        "graphs": model.num_graphs,
        "ops": dict(model.ops.most_common()),
        "engines": dict(model.engines.most_common()),
        "fused_from": dict(model.fused_from.most_common()),
        "fusions": [{**asdict(f), "verdict": f.verdict} for f in judge_fusions(model.ops)],
        "weight_bytes": model.weight_bytes,
        "external_weights": list(model.external_weights),
        "attributes": model.attributes,
    }


def render_om(om: OmFile) -> RenderableType:
    """Return the tables."""
    parts: list[RenderableType] = [_totals(om)]
    for model in om.models:
        if len(om.models) > 1:
            parts.append(Text(f"\nmodel {printable(model.name)}", style="bold"))
        parts += [_ports(model), _ops(model), _partitions(model)]
        if judge_fusions(model.ops):
            parts.append(_fusions(model))
    return Group(*parts)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(f"\n{title}"), title_justify="left", title_style="bold", header_style="dim", box=None)
    for name in columns:
        table.add_column(name, justify="right" if name in {"count", "bytes", "from"} else "left", overflow="fold")
    return table


def _totals(om: OmFile) -> Table:
    header = om.header
    table = _table(f"{printable(str(om.path))}", "", "")
    rows = {
        "name": header.name,
        "kind": MODEL_TYPES.get(header.model_type, f"type {header.model_type}"),
        "written by": header.platform_version or "not said",
        "built for": ", ".join(sorted({m.soc_version for m in om.models if m.soc_version})) or "not said",
        "size": human_bytes(om.size_bytes),
        "shapes": "dynamic" if header.is_dynamic else "static or gears",
        "host": "bound to the host it was built for" if header.is_os_bound else "any",
        "weights inside": human_bytes(sum(m.weight_bytes for m in om.models)),
        "weights beside": f"{sum(len(m.external_weights) for m in om.models)} files",
    }
    if "simulated" in header.platform_version.lower():
        rows["warning"] = "simulated: no device can run this file"
    for label, value in rows.items():
        table.add_row(label, Text(printable(value)))
    return table


def _ports(model: OmModel) -> Table:
    table = _table("Inputs and outputs", "", "name", "type", "shape", "layout")
    ports = [("in", port) for port in model.inputs] + [("out", port) for port in model.outputs]
    for direction, port in ports[:_MAX_ROWS]:
        table.add_row(direction, Text(printable(port.name)), port.dtype, _shape(port), Text(printable(port.layout)))
    if len(ports) > _MAX_ROWS:
        table.add_row("", f"... and {len(ports) - _MAX_ROWS} more (--json has all)")
    for index, gear in enumerate(model.gears[:_MAX_ROWS]):
        shapes = "; ".join(",".join(str(d) for d in shape) for shape in gear)
        table.add_row("gear", str(index), "", Text(shapes))
    return table


def _shape(port: OmPort) -> str:
    return f"[{','.join(str(d) for d in port.shape)}]".replace("[", "\\[", 1)


def _ops(model: OmModel) -> Table:
    title = f"Operators after fusion ({sum(model.ops.values())} in {model.num_graphs} graphs)"
    table = _table(title, "type", "count", "from")
    for op, count in model.ops.most_common(_MAX_ROWS):
        merged = model.fused_from[op]
        table.add_row(Text(printable(op)), str(count), f"{merged} nodes" if merged else "")
    if len(model.ops) > _MAX_ROWS:
        table.add_row(f"... and {len(model.ops) - _MAX_ROWS} more types (--json has all)", "", "")
    for engine, count in model.engines.most_common(8):
        table.add_row(Text(printable(f"by {engine}"), style="dim"), str(count), "")
    return table


def _partitions(model: OmModel) -> Table:
    table = _table("Partitions", "name", "bytes")
    for partition in model.partitions:
        table.add_row(partition.name, f"{partition.size_bytes:,}")
    return table


def _fusions(model: OmModel) -> Table:
    table = _table("Fusions", "fusion", "verdict", "done", "left", "note")
    for fusion in judge_fusions(model.ops):
        colour = {"done": "green", "partly": "yellow", "missed": "red"}[fusion.verdict]
        note = fusion.note if fusion.left else ""
        table.add_row(fusion.name, f"[{colour}]{fusion.verdict}[/]", str(fusion.done), str(fusion.left), note)
    return table
