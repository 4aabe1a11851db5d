"""Refuse, before any work, a quantization that cannot be done as it was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from qcompile.calibration.text import BUILT_IN
from qcompile.errors import PassError, UnsupportedOpError
from qcompile.passes import registry
from qcompile.passes.base import Pass
from qcompile.passes.fold_scales import FoldScales
from qcompile.passes.lower_kv8_to_ort import LowerKv8ToOrt
from qcompile.passes.quantize_int8 import QuantizeInt8Dynamic
from qcompile.passes.quantize_kv8 import QuantizeKv8
from qcompile.passes.quantize_lossless import QuantizeLossless
from qcompile.passes.quantize_model import QuantizeModel
from qcompile.passes.quantize_rotation import RotateResidual
from qcompile.quantize_options import QuantizeOptions
from qcompile.target import Target


def cache_dtype(model: ir.Model) -> ir.DataType | None:
    """Return the type of a decoder's KV cache."""
    return next((v.dtype for v in model.graph.inputs if (v.name or "").startswith("past_key_values.")), None)


def check_quantization(
    plan: Sequence[type[Pass]], options: QuantizeOptions, target: Target, model: ir.Model, *, has_chart: bool
) -> None:
    """Hold what was asked for against the model, the target and itself.

    Args:
        plan: The passes that will run.
        options: What the quantization passes were told.
        target: Where the model will run.
        model: As it was read.
        has_chart: Whether a chart of the choice of bits is wanted.

    Raises:
        PassError: Passes or options exclude each other, or the model has an int8 cache already.
        UnsupportedOpError: The target has no kernels for it.
    """
    schemes = [step.name for step in plan if issubclass(step, QuantizeModel)]
    if len(schemes) > 1:
        raise PassError(
            f"--passes names {' and '.join(schemes)}: a model is quantized once; choose one, and use --layer"
        )
    if cache_dtype(model) == ir.DataType.INT8 and not set(registry.QUANTIZE).isdisjoint(plan):
        raise PassError("the model has an int8 KV cache already; quantize the model that it was made from")
    if has_chart and options.quality is None and options.size is None:
        raise PassError("--layer-chart shows how --quality or --size chose; give one of them")
    if QuantizeInt8Dynamic in plan and not target.rounds_per_token:
        raise UnsupportedOpError(
            f"int8-dynamic: {target.name} has no kernels for activations with a scale per token; "
            "use --passes int8, int8-static or int8-weight"
        )
    if QuantizeKv8 in plan and LowerKv8ToOrt not in plan:
        raise UnsupportedOpError("kv8: the target has no int8 KV cache; use --target ort, or leave kv8 out of --passes")
    if QuantizeLossless in plan:
        _check_lossless(plan, options, target)
    elif not schemes:
        _check_without_scheme(options, has_kv8=QuantizeKv8 in plan)


def _check_lossless(plan: Sequence[type[Pass]], options: QuantizeOptions, target: Target) -> None:
    """Refuse what would move weights off their grids first, or round them again."""
    others = [step.name for step in plan if issubclass(step, (QuantizeModel, RotateResidual, FoldScales))]
    if others:
        raise PassError(
            f"lossless keeps the codes that weights have, and {others[0]} changes weights: name one of them"
        )
    if target.chip is not None:
        raise UnsupportedOpError(
            f"lossless: {target.name} has no operators that unpack codes when a model is loaded; "
            "use --target ort or portable, or --passes int8"
        )
    if replace(options, keep_float=(), calibration=BUILT_IN) != QuantizeOptions():
        raise PassError("lossless takes --keep-float alone: bits and groups are those that the weights have")


def _check_without_scheme(options: QuantizeOptions, *, has_kv8: bool) -> None:
    """Options that nothing would look at are refused; kv8 looks at its text."""
    if has_kv8 and replace(options, calibration=BUILT_IN) != QuantizeOptions():
        raise PassError(
            "kv8 takes --calibration alone, the other options are for weights; add int8 or int4 to --passes"
        )
    if not has_kv8 and options != QuantizeOptions():
        raise PassError("quantization options are given and no quantization pass; add int8 or int4 to --passes")
