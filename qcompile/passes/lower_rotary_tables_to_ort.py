"""Compute the rotary tables of GroupQueryAttention from their frequencies when ONNX Runtime loads the model.

    cos [T, d/2], sin [T, d/2]   ->   Cos(p f) * c, Sin(p f) * c        p = 0 .. T - 1, f [d/2], c a common factor

32,768 positions of 32 frequencies are 8 MB otherwise, 2 % of an int8 model of 0.5B. The frequencies are read off the row
of position 1 and adjusted by a few units in the last place, because the tables hold what rounding p f to float32 makes of
large angles. Done only where that gives the tables back to float32 rounding of cosines.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.passes.base import Pass, PassContext, PassResult, Rejection
from qcompile.passes.change import finish_rewrites, named_constant
from qcompile.passes.kernel_rewrite import MICROSOFT

_SMALLEST_TABLE = 1024
COS, SIN = 7, 8  # among the kernel's inputs
# Cosines of equal angles by two libraries.
MAX_ERROR = 1e-6
_UNITS = 12


class LowerRotaryTablesToOrt(Pass):
    """Rotary tables."""

    name = "lower-rotary-tables-to-ort"
    summary = "rotary tables -> computed from frequencies at load"

    def call(self, context: PassContext, result: PassResult) -> None:
        """Replace every pair of tables that its frequencies give back."""
        graph = context.model.graph
        for (cos, sin), readers in tables_of(graph).items():
            result.matches += 1
            reason = _replace(graph, cos, sin, readers, result, is_counted=context.prover is not None)
            if reason:
                result.rejected.append(Rejection(cos.name or "", self.name, reason))
        if result.rewrites:
            finish_rewrites(context)


def tables_of(graph: ir.Graph) -> dict[tuple[ir.Value, ir.Value], list[ir.Node]]:
    """Return the attention kernels of a graph by the constant cos and sin they rotate with, float [T, d/2]."""
    pairs: dict[tuple[ir.Value, ir.Value], list[ir.Node]] = {}
    for node in graph:
        if (node.domain, node.op_type) == (MICROSOFT, "GroupQueryAttention") and len(node.inputs) > SIN:
            cos, sin = node.inputs[COS], node.inputs[SIN]
            if cos is not None and sin is not None and cos.const_value is not None and sin.const_value is not None:
                pairs.setdefault((cos, sin), []).append(node)
    return pairs


def _replace(
    graph: ir.Graph, cos: ir.Value, sin: ir.Value, readers: list[ir.Node], result: PassResult, *, is_counted: bool
) -> str:
    """Put the computation in the place of a pair of tables; return why not, or nothing."""
    assert cos.const_value is not None
    assert sin.const_value is not None
    tables = np.asarray(cos.const_value.numpy()), np.asarray(sin.const_value.numpy())
    length = len(tables[0])
    if length < _SMALLEST_TABLE or tables[0].dtype != np.float32:
        return f"a table of {length} positions in {tables[0].dtype} stays as it is"
    if not tables[0][0, 0] > 0:
        return "the angles are not positions times frequencies (the cosine at position 0 is not positive)"
    factor, frequencies = tables[0][0, 0], _frequencies(*tables)
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies
    seen = np.cos(angles) * factor - tables[0], np.sin(angles) * factor - tables[1]
    error = max(float(np.abs(difference).max()) for difference in seen)
    if not error <= MAX_ERROR * max(1.0, abs(float(factor))):
        return f"the angles are not positions times frequencies (error {error:.1e})"
    if is_counted:
        result.proved += 1
        result.max_error = max(result.max_error, error)
    nodes = _computation(graph, cos.name or "rotary", frequencies, factor, length)
    graph.insert_before(readers[0], nodes)
    for reader in readers:
        for index, node in zip((COS, SIN), nodes[-2:], strict=True):
            reader.replace_input_with(index, node.outputs[0])
    result.rewrites += 1
    return ""


def _frequencies(cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Return float32 [d/2]: per frequency the neighbour of the angle at position 1 that the last rows fit best."""
    near = np.arctan2(sin[1].astype(np.float64), cos[1]).astype(np.float32)
    steps = np.arange(-_UNITS, _UNITS + 1)[:, None]
    candidates = (near.view(np.int32) + steps).astype(np.int32).view(np.float32)
    positions = np.linspace(1, len(cos) - 1, 257).astype(np.int64)
    angles = positions.astype(np.float32)[None, :, None] * candidates[:, None]
    wanted = np.stack([cos[positions], sin[positions]]) / cos[0, 0]
    error = np.abs(np.cos(angles) - wanted[0]).max(axis=1) + np.abs(np.sin(angles) - wanted[1]).max(axis=1)
    return np.asarray(candidates[error.argmin(axis=0), np.arange(len(near))])


def _computation(graph: ir.Graph, name: str, frequencies: np.ndarray, factor: np.float32, length: int) -> list[ir.Node]:
    """Return the nodes of both tables; the last two give them."""
    bounds = [named_constant(graph, f"number.{n}", np.array(n, np.int64)) for n in (0, length, 1)]
    last = named_constant(graph, "axes.-1", np.array([-1], np.int64))
    rates = named_constant(graph, f"{name}.frequencies", frequencies)
    scale = named_constant(graph, f"{name}.factor", np.array(factor, np.float32))
    numbers = ir.node("Range", bounds)
    floats = ir.node("Cast", [numbers.outputs[0]], {"to": int(ir.DataType.FLOAT)})
    column = ir.node("Unsqueeze", [floats.outputs[0], last])
    angles = ir.node("Mul", [column.outputs[0], rates])
    curves = [ir.node(op_type, [angles.outputs[0]]) for op_type in ("Cos", "Sin")]
    tables = [ir.node("Mul", [curve.outputs[0], scale]) for curve in curves]
    for table in tables:
        table.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        table.outputs[0].shape = ir.Shape([length, len(frequencies)])
    return [numbers, floats, column, angles, *curves, *tables]
