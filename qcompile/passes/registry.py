"""Every pass by its name, the groups people type, and the order in which they run.

Phases: clean, canonicalize, fuse, quantize, lower, clean. The order inside a phase is the order of these tables; what a
user lists after `--passes` selects from it and never reorders it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from qcompile.errors import PassError
from qcompile.passes.base import Pass
from qcompile.passes.canonicalize_arithmetic import CanonicalizeArithmetic
from qcompile.passes.canonicalize_operands import CanonicalizeOperands
from qcompile.passes.canonicalize_projections import CanonicalizeProjections
from qcompile.passes.canonicalize_shapes import CanonicalizeShapes
from qcompile.passes.clean import (
    EliminateCommonSubexpressions,
    EliminateDeadCode,
    EliminateIdentities,
    LiftConstants,
)
from qcompile.passes.deduplicate_initializers import DeduplicateInitializers
from qcompile.passes.fold_constants import FoldConstants
from qcompile.passes.fold_scales import Awq, SmoothQuant
from qcompile.passes.fuse_add_layer_norm import FuseAddLayerNorm
from qcompile.passes.fuse_add_rms_norm import FuseAddRmsNorm
from qcompile.passes.fuse_attention import FuseAttention
from qcompile.passes.fuse_gate_up import FuseGateUp
from qcompile.passes.fuse_gelu import FuseGelu
from qcompile.passes.fuse_layer_norm import FuseLayerNorm
from qcompile.passes.fuse_linear import FuseLinear
from qcompile.passes.fuse_qkv import FuseQkv
from qcompile.passes.fuse_rms_norm import FuseRmsNorm
from qcompile.passes.fuse_rotary_embedding import FuseRotaryEmbedding
from qcompile.passes.fuse_swiglu import FuseSwiGlu
from qcompile.passes.inline_exporter_functions import InlineExporterFunctions
from qcompile.passes.inline_functions import InlineFunctions
from qcompile.passes.lower_attention_scale_to_ort import LowerAttentionScaleToOrt
from qcompile.passes.lower_attention_to_ort import LowerAttentionToOrt
from qcompile.passes.lower_kv8_to_ort import LowerKv8ToOrt
from qcompile.passes.lower_quantized_activations_to_ort import LowerQuantizedActivationsToOrt
from qcompile.passes.lower_quantized_blocks_to_ort import LowerQuantizedBlocksToOrt
from qcompile.passes.lower_rotary_tables_to_ort import LowerRotaryTablesToOrt
from qcompile.passes.lower_to_ort import LowerToOrt
from qcompile.passes.lower_weights_to_ort import LowerWeightsToOrt
from qcompile.passes.narrow_scales import NarrowScales
from qcompile.passes.normalize_opset import NormalizeOpset
from qcompile.passes.quantize_int4 import QuantizeInt4
from qcompile.passes.quantize_int8 import QuantizeInt8, QuantizeInt8Dynamic, QuantizeInt8Norm, QuantizeInt8Static
from qcompile.passes.quantize_kv8 import QuantizeKv8
from qcompile.passes.quantize_lossless import QuantizeLossless
from qcompile.passes.quantize_rotation import RotateResidual
from qcompile.passes.root_shapes import RootShapes
from qcompile.passes.select_last_token import SelectLastToken

CLEAN: tuple[type[Pass], ...] = (
    InlineExporterFunctions,
    LiftConstants,
    FoldConstants,
    EliminateIdentities,
    EliminateDeadCode,
    DeduplicateInitializers,
    EliminateCommonSubexpressions,
)
CANONICALIZE: tuple[type[Pass], ...] = (
    NormalizeOpset,
    RootShapes,
    CanonicalizeShapes,
    CanonicalizeProjections,
    CanonicalizeOperands,
    CanonicalizeArithmetic,
)
# LayerNorm before RmsNorm: without its gamma and beta a centred norm looks like an RMS norm of (x - mean).
FUSE: tuple[type[Pass], ...] = (
    FuseLayerNorm,
    FuseRmsNorm,
    FuseGelu,
    FuseLinear,
    FuseSwiGlu,
    FuseRotaryEmbedding,
    FuseAttention,
    FuseQkv,
    FuseGateUp,
    FuseAddLayerNorm,
    FuseAddRmsNorm,
)
QUANTIZE: tuple[type[Pass], ...] = (
    QuantizeKv8,
    QuantizeLossless,
    RotateResidual,
    SmoothQuant,
    Awq,
    QuantizeInt8,
    QuantizeInt8Norm,
    QuantizeInt8Dynamic,
    QuantizeInt8Static,
    QuantizeInt4,
)
LOWER: tuple[type[Pass], ...] = (
    SelectLastToken,
    LowerWeightsToOrt,
    LowerQuantizedBlocksToOrt,
    LowerQuantizedActivationsToOrt,
    LowerToOrt,
    LowerAttentionToOrt,
    LowerKv8ToOrt,
    LowerAttentionScaleToOrt,
    LowerRotaryTablesToOrt,
    NarrowScales,
    InlineFunctions,
)
PASSES: dict[str, type[Pass]] = {p.name: p for p in (*CLEAN, *CANONICALIZE, *FUSE, *QUANTIZE, *LOWER)}
GROUPS: dict[str, tuple[str, ...]] = {
    "clean": tuple(p.name for p in CLEAN),
    "canonicalize": tuple(p.name for p in CANONICALIZE),
    "fuse": tuple(p.name for p in FUSE),
    # Rounding activations loses a third as much when the residual stream is rotated first, and needs no step per token.
    "int8": (RotateResidual.name, QuantizeInt8Norm.name),
    "int8-norm": (RotateResidual.name, QuantizeInt8Norm.name),
    "int8-dynamic": (RotateResidual.name, QuantizeInt8Dynamic.name),
    "int8-static": (RotateResidual.name, QuantizeInt8Static.name),
}


def expand(names: Iterable[str]) -> list[str]:
    """Return single pass names for a list of pass and group names, in running order, each once.

    Raises:
        PassError: A name is unknown; the message suggests the nearest.
    """
    wanted: set[str] = set()
    for name in names:
        if name in GROUPS:
            wanted.update(GROUPS[name])
        elif name in PASSES:
            wanted.add(name)
        else:
            raise PassError(_unknown(name))
    return [name for name in PASSES if name in wanted]


def _unknown(name: str) -> str:
    known = sorted({*PASSES, *GROUPS})
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(known)}"
    return f"unknown pass '{name}'; {hint}"
