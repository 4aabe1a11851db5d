"""From samples to one row per engine, and the table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from setup_peers import Prepared

_SPEEDS = ("short_prefill", "long_prefill", "short_decode", "long_decode", "batch_decode", "load_s", "peak_rss_bytes")


def summarize(peers: Sequence[Prepared], samples: Sequence[dict[str, Any]], reference: str) -> list[dict[str, Any]]:
    """Return one record per engine: medians with their range, quality, and why it was not run."""
    wanted = answers_of(samples, reference)
    return [_record(peer, [s for s in samples if s["peer"] == peer.name], wanted) for peer in peers]


def answers_of(samples: Sequence[dict[str, Any]], name: str) -> list[list[int]]:
    """Return an engine's greedy answers."""
    return next((s["answers"] for s in samples if s["peer"] == name and "answers" in s), [])


def _record(peer: Prepared, samples: list[dict[str, Any]], wanted: list[list[int]]) -> dict[str, Any]:
    timed = [s for s in samples if s["task"] == "speed" and "error" not in s]
    judged = next((s for s in samples if s["task"] == "quality" and "error" not in s), None)
    record: dict[str, Any] = {"name": peer.name, "bits": peer.bits, "size_bytes": peer.size_bytes, "rounds": len(timed)}
    for key in _SPEEDS:
        values = [s[key] for s in timed]
        record[key] = {"median": statistics.median(values), "low": min(values), "high": max(values)} if values else None
    record["quality"] = {k: judged[k] for k in ("tokens", "mean_kl", "p99_kl", "top1")} if judged else None
    answers = timed[0]["answers"] if timed else []
    record["same_tokens"] = [common_length(a, b) for a, b in zip(wanted, answers, strict=False)]
    errors = list(dict.fromkeys(f"{s['task']}: {s['error']}" for s in samples if "error" in s))
    record["problem"] = peer.problem or "; ".join(errors)
    return record


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two answers begin with in common."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def markdown(record: dict[str, Any]) -> str:
    """Return the table, and below it what was not run."""
    head = ("engine", "n", "MB", "prefill 128", "prefill 1024", "decode @128", "decode @1024", "batch 8 decode")
    head += ("peak RSS MiB", "load s", "mean KL", "99 % KL", "top-1", "same greedy tokens")
    machine = record["machine"]
    lines = [
        "# qcompile and its peers",
        "",
        f"{machine['cpu']}, {machine['threads']} threads; onnxruntime {machine['onnxruntime']} (ours). Speeds in tokens/s:",
        "median (lowest-highest) of n interleaved rounds, each engine in a fresh process. KL against the checkpoint in",
        "float32, on the same tokens.",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(_cells(peer))} |" for peer in record["peers"]),
        "",
        *(f"- {p['name']} not run: {p['problem']}" for p in record["peers"] if p["problem"]),
    ]
    if record.get("warning"):
        lines += ["", f"Warning: {record['warning']}"]
    return "\n".join(lines) + "\n"


def _cells(peer: dict[str, Any]) -> list[str]:
    if not peer["rounds"] and peer["quality"] is None:
        return [peer["name"], "0", *["not run"] * 12]
    quality = peer["quality"]
    judged = (
        [f"{quality['mean_kl']:.3g}", f"{quality['p99_kl']:.3g}", f"{quality['top1']:.2%}"] if quality else ["-"] * 3
    )
    return [
        peer["name"],
        str(peer["rounds"]),
        f"{peer['size_bytes'] / 1e6:.4g}",
        *(_range(peer[key], digits) for key, digits in zip(_SPEEDS[:5], (0, 0, 1, 1, 0), strict=True)),
        _range(peer["peak_rss_bytes"], 0, 1 / 2**20),
        _range(peer["load_s"], 1),
        *judged,
        ", ".join(map(str, peer["same_tokens"])) or "-",
    ]


def _range(value: dict[str, float] | None, digits: int, scale: float = 1.0) -> str:
    if value is None:
        return "-"
    median, low, high = (value[k] * scale for k in ("median", "low", "high"))
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"
