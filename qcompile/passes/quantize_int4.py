"""Int4 weights, float activations: one scale and one zero point per group of 32 inputs.

A zero point per group is worth 40 % of the loss at 4 bits, at half a byte per group.
"""

from __future__ import annotations

from typing import ClassVar

from qcompile.passes.quantize_model import QuantizeModel
from qcompile.quantize_options import LayerOptions


class QuantizeInt4(QuantizeModel):
    """Int4 weights in groups."""

    name = "int4"
    summary = "projections and embedding -> int4 weights with a scale and a zero point per group"
    defaults: ClassVar[tuple[LayerOptions, ...]] = (LayerOptions("*", bits=4, symmetric=False, activations="float"),)
