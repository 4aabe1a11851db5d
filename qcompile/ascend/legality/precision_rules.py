"""Rules about the precision modes of ATC: their names, which chip has them, what they exclude."""

from __future__ import annotations

from collections.abc import Iterator

from qcompile.ascend.legality.finding import Finding
from qcompile.ascend.legality.rule import (
    BFLOAT16_MODES,
    MODES_OF_NEWER_CHIPS,
    PRECISION_MODES,
    WRONG,
    Context,
    ModelRule,
    about_model,
)

_QUANT = frozenset({"AscendQuant", "AscendDequant"})
_KEEP = frozenset({"force_fp32", "origin"})


def precision_names(context: Context) -> Iterator[Finding]:
    """Precision modes are words that ATC knows."""
    options = context.options
    given = {"precision_mode": options.precision_mode, "precision_mode_v2": options.precision_mode_v2}
    for name, mode in given.items():
        if mode and mode not in PRECISION_MODES[name]:
            yield about_model(
                "precision-mode-name",
                "E10001",
                name=f"--{name}",
                seen=f"the mode {mode!r}",
                wanted=f"one of {', '.join(sorted(PRECISION_MODES[name]))}",
                cure="correct the name, or leave it out",
            )
        elif mode in MODES_OF_NEWER_CHIPS or (mode in BFLOAT16_MODES and context.chip.family == "310P"):
            yield about_model(
                "precision-mode-chip",
                "E10001",
                name=f"--{name}",
                seen=f"the mode {mode!r} for {context.chip.name}",
                wanted="a mode of types that this chip has",
                cure="leave it out: `qcompile atc` chooses the mode that fits the graph",
            )


def precision(context: Context) -> Iterator[Finding]:
    """Precision modes exclude each other, gears and quantized graphs."""
    options = context.options
    mode, v2 = options.precision_mode, options.precision_mode_v2
    if mode and v2:
        yield about_model(
            "precision-modes",
            "E10047",
            seen=f"--precision_mode={mode} and --precision_mode_v2={v2}",
            wanted="one of them",
            cure="drop one",
        )
    ops = {node.op for node in context.view.nodes}
    weights = {v.dtype for v in context.view.values.values() if v.tensor is not None and len(v.shape or ()) >= 2}
    keeps_fp32 = mode == "must_keep_origin_dtype" and "f16" not in weights and "bf16" not in weights
    if ops & _QUANT and (mode in _KEEP or v2 in _KEEP or keeps_fp32 or options.op_precision_mode):
        chosen = mode or v2 or "high precision per operator"
        yield about_model(
            "quantized-precision",
            "E10055",
            seen=f"AscendQuant or AscendDequant with {chosen}",
            wanted="an fp16 graph with force_fp16 or allow_fp32_to_fp16",
            cure="export in fp16 and leave the precision mode to `qcompile atc`",
        )
    narrowing = {mode, v2} & {"force_fp16", "fp16"}
    if narrowing and "bf16" in weights:
        yield about_model(
            "bfloat16-narrowed",
            "",
            effect=WRONG,
            seen=f"a bf16 graph with {mode or v2}",
            wanted="must_keep_origin_dtype",
            cure="bf16 values above 65504 become infinite in fp16: keep the types",
        )


PRECISION_RULES: tuple[ModelRule, ...] = (precision_names, precision)
