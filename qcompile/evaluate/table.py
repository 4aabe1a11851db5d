"""The scoreboard as a terminal table."""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


def render(record: dict[str, Any]) -> RenderableType:
    """One row per case type and one for all, then speed and notes."""
    passes = sorted({k for score in record["by_type"].values() for k in score.get("pass_at", {})}, key=int)
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 1, 0, 0))
    columns = ["%", "cases", "format", "accuracy", "interval", *(f"pass@{k}" for k in passes), "tokens", "cut off"]
    for column in columns:
        table.add_column(column, justify="left" if column == "%" else "right", no_wrap=True)
    rows = list(record["by_type"].items())
    if len(rows) != 1:
        rows.append(("all", record["score"]))
    for name, score in rows:
        is_total = name == "all"
        shares = [score.get("pass_at", {}).get(k) if not is_total else None for k in passes]
        cells = [str(score["cases"]), _bare(score["format"]), _bare(score["accuracy"]), interval(score["accuracy"])]
        cells += [_bare(share) if share else "" for share in shares]
        cells += [f"{score['output_tokens']['mean']:.0f}", _bare(score["cut_off"])]
        table.add_row(name, *cells, style="bold" if is_total else None)
    lines = [speed_line(record["speed"]), *(f"note: {note}" for note in record["notes"])]
    return Group(table, *(Text(line) for line in lines))


def percent(share: dict[str, Any]) -> str:
    """A share in percent; a dash where nothing was counted."""
    return f"{share['share'] * 100:.1f} %" if share["total"] else "-"


def _bare(share: dict[str, Any]) -> str:
    return percent(share).removesuffix(" %")


def interval(share: dict[str, Any]) -> str:
    """The 95 % interval in percent."""
    if not share["total"]:
        return ""
    low, high = share["interval_95"]
    return f"{low * 100:.1f}–{high * 100:.1f}"


def speed_line(speed: dict[str, Any]) -> str:
    """Tokens, seconds, tokens/s and TTFT in one line."""
    if not speed["texts"]:
        return "no text was generated"
    if "generation_s" not in speed:
        return f"{speed['generated_tokens']:,} tokens"
    ttft = speed["ttft_s"]
    return (
        f"{speed['generated_tokens']:,} tokens in {speed['generation_s']:.1f} s: "
        f"{speed['tokens_per_s'] or 0:,.0f} tokens/s; "
        f"TTFT median {ttft['median'] * 1e3:.0f} ms, p95 {ttft['p95'] * 1e3:.0f} ms"
    )
