"""Int8 weights: four schemes, by what becomes of the activations.

    int8-weight     float                                  LinearW8, one scale per block of 32 inputs (W8A16)
    int8-norm       int8 by one known scale behind norms   LinearW8A8Static, one scale per output (W8A8)
    int8-dynamic    int8, one scale per token              LinearW8A8, one scale per output (W8A8)
    int8-static     int8, one calibrated scale             LinearW8A8Static, one scale per output (W8A8)

In the last three the embedding, the output head and what follows the activation of a feed-forward (down_proj) are W8A16.
The head is bound by memory, not by arithmetic, when tokens are generated; blocks of 128 cost 3 % more bytes than one scale
per row and a third of the error. The inputs of down_proj are products of two projections, with outliers that no rotation of
the residual stream reaches: measured on a 0.5B model, they are 70 % of what rounding all activations costs.

`int8-norm` rounds what a norm of the rotated residual stream gives, where one step fits every row (`unit_norm`). What
follows attention (o_proj) reads no norm and is W8A16 as well, with one scale per output: no bytes more than W8A8.
"""

from __future__ import annotations

from typing import ClassVar

from qcompile.passes.quantize_model import QuantizeModel
from qcompile.passes.quantize_projections import DOWN, EMBEDDING, HEAD, O_PROJ
from qcompile.quantize_options import LayerOptions

_FLOAT_INPUTS = (
    LayerOptions(HEAD, activations="float"),
    LayerOptions(EMBEDDING, activations="float"),
    LayerOptions(DOWN, activations="float", group_size=256),
)


class QuantizeInt8(QuantizeModel):
    """Int8 weights, float activations."""

    name = "int8-weight"
    summary = "projections and embedding -> int8 weights with one scale per block (W8A16)"
    # ONNX Runtime's kernel rounds activations to 8 bits per block, and so do others: small blocks matter more for that
    # than for the weights. KL on a 0.5B model: 0.0027 with blocks of 128, 0.0010 with 32, 0.0009 with 16 for down_proj.
    # The Ascend kernel takes multiples of 32: give it --layer down_proj:group_size=32.
    defaults: ClassVar[tuple[LayerOptions, ...]] = (
        LayerOptions("*", bits=8, activations="float", group_size=32),
        LayerOptions(DOWN, group_size=16),
        LayerOptions(HEAD, group_size=16),
    )


class QuantizeInt8Norm(QuantizeModel):
    """Int8 weights, and int8 activations behind the norms of a rotated residual stream, by one step for all rows."""

    name = "int8-norm"
    summary = "projections -> int8 weights per channel, int8 activations with one step behind norms"
    defaults: ClassVar[tuple[LayerOptions, ...]] = (
        LayerOptions("*", bits=8, activations="norm"),
        LayerOptions(O_PROJ, activations="float", group_size="channel"),
        *_FLOAT_INPUTS,
    )


class QuantizeInt8Dynamic(QuantizeModel):
    """Int8 weights and activations; every token has a scale of its own."""

    name = "int8-dynamic"
    summary = "projections -> int8 weights per channel, int8 activations per token (W8A8)"
    defaults: ClassVar[tuple[LayerOptions, ...]] = (LayerOptions("*", bits=8, activations="dynamic"), *_FLOAT_INPUTS)


class QuantizeInt8Static(QuantizeModel):
    """Int8 weights and activations; one calibrated scale for all tokens."""

    name = "int8-static"
    summary = "projections -> int8 weights per channel, int8 activations with calibrated scales (W8A8)"
    defaults: ClassVar[tuple[LayerOptions, ...]] = (LayerOptions("*", bits=8, activations="static"), *_FLOAT_INPUTS)
