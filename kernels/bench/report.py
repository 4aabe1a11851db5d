"""The results as Markdown: what was measured, where, every case with wins and losses."""

import datetime
import platform
from typing import Any

import torch

_AIMS = {
    "matmul_bias_residual": 0.70,
    "matmul_int8": 0.70,
    "gemv_int8": 0.85,
    "gemv_int4": 0.75,
}
_AIM = 0.90
_FILLS_BYTES = 64 << 20  # below this a kernel is too short to reach the copy's rate

_LEGEND = (
    "Floor: bytes over the copy's rate, or operations over the plain product's, whichever is longer. * marks a library "
    "operator that computes less than the kernel. **bold**: slower than torch.compile, or below its aim where the case "
    "fills the chip."
)


def machine() -> dict[str, str]:
    """Date, hardware and versions."""
    import transformers
    import triton

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "device": name,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def markdown(results: dict[str, Any]) -> str:
    """The whole page."""
    parts = ["# Results on a GPU", "", ", ".join(f"{name} {value}" for name, value in results["machine"].items()), ""]
    ceilings = results["ceilings"]
    parts += [
        f"Ceilings measured here: copy {ceilings['copy_gb_per_s']:.0f} GB/s (read plus written); plain products "
        + ", ".join(f"{name} {rate:.0f} T/s" for name, rate in ceilings["rates_t_per_s"].items())
        + f". dtype {results['dtype']}, torch.compile in mode {results['compile_mode']}. "
        "Times are medians of replayed CUDA graphs of many calls over input sets larger than the cache; "
        "NVIDIA hardware, nothing here says anything about Ascend.",
        "",
        _LEGEND,
        "",
        *_kernel_table(results["kernels"]),
        "",
        *_decode_table(results["decode"]),
        "",
        "Raw numbers: `results.json` beside this page, or wherever `--output` put them.",
    ]
    return "\n".join(parts) + "\n"


def _kernel_table(rows: list[dict[str, Any]]) -> list[str]:
    head = "| operator | case | kernel us | eager us | torch.compile us | library us | floor us | of floor | error |"
    lines = [head, "|---|---|--:|--:|--:|--:|--:|--:|--:|"]
    for row in rows:
        us = row["us"]
        vendor = (
            f"{us['vendor']:.1f} {row['vendor']}{'*' if row['vendor_computes_less'] else ''}" if "vendor" in us else ""
        )
        kernel = _marked(f"{us['kernel']:.1f}", us["kernel"] > us["compile"])
        fraction = _marked(f"{row['fraction']:.0%}", is_below_aim(row))
        error = f"{row['errors']['kernel']:.1e}" + ("" if row["is_right"] else " **WRONG**")
        lines.append(
            f"| {row['operator']} | {row['case']} | {kernel} | {us['eager']:.1f} | {us['compile']:.1f} | {vendor} | "
            f"{row['floor_us']:.1f} | {fraction} | {error} |"
        )
    slower = sum(row["us"]["kernel"] > row["us"]["compile"] for row in rows)
    below = sum(is_below_aim(row) for row in rows)
    return [*lines, "", f"{len(rows)} cases: {slower} slower than torch.compile, {below} below their aim."]


def is_below_aim(row: dict[str, Any]) -> bool:
    """Whether a case that fills the chip misses the fraction of the floor that its operator aims at."""
    return row["size_bytes"] >= _FILLS_BYTES and row["fraction"] < _AIMS.get(row["operator"], _AIM)


def _decode_table(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = ["| model | batch | variant | tokens/s | against eager | same tokens |", "|---|--:|---|--:|--:|--:|"]
    for row in rows:
        base = row["variants"]["eager"]["tokens_per_s"]
        for name, result in row["variants"].items():
            rate = result["tokens_per_s"]
            lines.append(
                f"| {row['model']} | {row['batch']} | {name} | {rate:.0f} | {rate / base:.2f}x | {result['agree']:.1%} |"
            )
    note = "Random weights: their logits lie close together, so tokens part by rounding sooner than a trained model's."
    return [
        "## Decode after a prompt of 128 tokens; DynamicCache for eager, StaticCache for the others",
        "",
        *lines,
        "",
        note,
    ]


def _marked(text: str, is_marked: bool) -> str:
    return f"**{text}**" if is_marked else text
