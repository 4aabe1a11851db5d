"""A copy of a model to work on: sorted, weights shared, shapes inferred as far as they can be."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from qcompile.errors import GraphError


def sorted_copy(model: ir.Model) -> ir.Model:
    """Return a copy with its nodes sorted and shapes inferred; weights are shared with `model`, not copied.

    The nodes of `model` itself are put in order as well (its meaning does not change).

    Raises:
        GraphError: The graph has a cycle.
    """
    try:
        model.graph.sort()
    except ValueError as error:
        raise GraphError(f"graph '{model.graph.name}' has a cycle: {error}; export it again") from error
    copy = model.clone()
    with _quiet_inference():
        ShapeInferencePass(data_prop=True)(copy)
    return copy


@contextmanager
def _quiet_inference() -> Iterator[None]:
    """Shape inference is a help, not a need: what it cannot infer is unknown, without a warning."""
    logger = logging.getLogger("onnx_ir.passes.common.shape_inference")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled
