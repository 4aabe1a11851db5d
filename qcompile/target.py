"""What each target accepts; adding a target is one entry of `TARGETS`."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import onnx_ir as ir

from qcompile.ascend.chips import chips
from qcompile.errors import UnsupportedOpError


@dataclass(frozen=True)
class Target:
    """A back end.

    Attributes:
        name: Spelling on the command line and in the manifest.
        summary: One line for `--help`.
        lowering: Names of the passes that lower a fused graph to it, in order.
        dtypes: Float types its kernels take.
        runs_here: Whether this machine's ONNX Runtime can run the result.
        chip: The Ascend chip that static graphs are lowered for, or None.
        smallest_group: Smallest block of quantized weights that its kernels take.
        rounds_per_token: Whether it has kernels for activations of int8 with a scale per token.
    """

    name: str
    summary: str
    lowering: tuple[str, ...]
    dtypes: frozenset[ir.DataType]
    runs_here: bool = True
    chip: str | None = None
    smallest_group: int = 16
    rounds_per_token: bool = True


_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            "ort",
            "ONNX Runtime on CPU: its fused kernels, KV cache in place, logits of the last token",
            (
                "select-last-token",
                "lower-weights-to-ort",
                "lower-quantized-blocks-to-ort",
                "lower-quantized-activations-to-ort",
                "lower-to-ort",
                "lower-attention-to-ort",
                "lower-kv8-to-ort",
                "lower-attention-scale-to-ort",
                "lower-rotary-tables-to-ort",
                "narrow-scales",
                "inline-functions",
            ),
            frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16}),
        ),
        Target(
            "portable",
            "any ONNX runtime: fused operators stay ONNX functions, the interface is the exported one",
            ("narrow-scales",),
            _FLOATS,
        ),
        *(
            Target(
                chip.target,
                f"{chip.name}: static graphs for CANN's ATC, one per shape bucket",
                (),
                _FLOATS,
                runs_here=False,
                chip=chip.name,
                smallest_group=32,
                rounds_per_token=chip.family == "910B",
            )
            for chip in chips().values()
        ),
    )
}


def target_named(name: str) -> Target:
    """Return a target, or raise UnsupportedOpError with the nearest name."""
    if name in TARGETS:
        return TARGETS[name]
    near = difflib.get_close_matches(name, TARGETS, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(TARGETS)}"
    raise UnsupportedOpError(f"unknown target '{name}'; {hint}")


def default_target(dtype: ir.DataType) -> Target:
    """Return `ort`, or `portable` for a dtype that ONNX Runtime's CPU kernels do not take (bfloat16)."""
    ort = TARGETS["ort"]
    return ort if dtype in ort.dtypes else TARGETS["portable"]
