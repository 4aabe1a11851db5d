"""Whether the fusions that a graph counts on happened: read off the operators of the compiled model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class FusionVerdict:
    """One fusion.

    Attributes:
        name: What was hoped for.
        done: Operators that show it happened.
        left: Operators that show it did not, after those that cannot be fused.
        note: What to look at when some are left.
    """

    name: str
    done: int
    left: int
    note: str

    @property
    def verdict(self) -> str:
        """``done``, ``partly`` or ``missed``."""
        if not self.left:
            return "done"
        return "partly" if self.done else "missed"


@dataclass(frozen=True)
class _Fusion:
    name: str
    fused: tuple[str, ...]
    plain: tuple[str, ...]
    allowed: int
    note: str


_ADD_NORM = ("AddRmsNorm", "InplaceAddRmsNorm", "AddRmsNormCast", "AddRmsNormQuant", "AddRmsNormDynamicQuant")
_FUSIONS = (
    _Fusion("Add + RmsNorm", _ADD_NORM, ("RmsNorm",), 1, "Add and norm must have one shape and type; q/k norms stay alone"),
    _Fusion("AddRmsNorm + quantize", ("AddRmsNormQuant", "AddRmsNormDynamicQuant"), ("AddRmsNorm",), 1,
            "only where the norm's result goes to the quantizer alone"),
    _Fusion("quantized MatMul", ("QuantBatchMatmulV3", "QuantBatchMatmulV4"), ("QuantBatchMatMul",), 0, "x must be [M,K]"),
    _Fusion("weight-only MatMul", ("WeightQuantBatchMatmulV2",), ("AscendAntiQuantV2", "AscendAntiQuant"), 0,
            "the weight must be a constant"),
    _Fusion("int8 MatMul + dequantize", ("FixPipe",), ("AscendDequant",), 0,
            "static shapes only; an int32 Add in between breaks it"),
    _Fusion("attention", ("PromptFlashAttention", "IncreFlashAttention", "FusedInferAttentionScore"), (), 0, ""),
    _Fusion("rotary embedding", ("RotaryMul", "RotaryPositionEmbedding", "ApplyRotaryPosEmb"), (), 0, ""),
    _Fusion("MatMul kernels of the third generation", ("MatMulV3", "BatchMatMulV3"), ("MatMulV2", "MatMul", "BatchMatMul"), 0,
            "needs static shapes in f16, bf16 or f32"),
    _Fusion("no format conversion", (), ("TransData",), 0, "keep --input_format=ND"),
)  # fmt: skip


def judge_fusions(ops: Counter[str]) -> list[FusionVerdict]:
    """Return a verdict for each fusion the model shows a trace of."""
    verdicts = []
    for fusion in _FUSIONS:
        done = sum(ops[name] for name in fusion.fused)
        plain = sum(ops[name] for name in fusion.plain)
        is_quantized_norm = fusion.name != "AddRmsNorm + quantize" or done or ops["DynamicQuant"] or ops["Quantize"]
        if (done or plain) and is_quantized_norm:
            left = max(0, plain - fusion.allowed)
            verdicts.append(FusionVerdict(fusion.name, done, left, fusion.note))
    return verdicts
