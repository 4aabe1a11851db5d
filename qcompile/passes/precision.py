"""In which precision each side of a rewrite computes what is sensitive to it.

Proofs run in float32 (`qcompile.passes.proof`), so they cannot see a Cast that was dropped. This is the other half:
a rewrite may not compute a softmax, a mean or a transcendental in fewer bits than the nodes it replaces. It may use more:
fused operators run norms and softmax in float32 by definition, also in a graph that ran them in float16, and reports
say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx
import onnx_ir as ir

from qcompile.analysis import Analysis
from qcompile.functions import DOMAIN, FUSED_OPS, MIN_OPSET

_SENSITIVE = frozenset(
    {"Softmax", "LogSoftmax", "ReduceMean", "ReduceSum", "Sqrt", "Exp", "Log", "Erf", "Tanh", "Sigmoid", "Sin", "Cos"}
)
_WITHOUT_FLOATS = frozenset({"Shape", "Size", "LessOrEqual", "Less", "Greater", "Equal", "And", "Or", "Not", "IsNaN"})


def float_bits(nodes: Iterable[ir.Node], analysis: Analysis) -> dict[str, int]:
    """Return the fewest bits in which each sensitive operator runs, fused operators included."""
    bits: dict[str, int] = {}
    for node in nodes:
        dtypes = [_dtype(v, analysis) for v in node.inputs]
        if node.domain == DOMAIN and node.op_type in FUSED_OPS:
            for op_type, dtype in _inside(FUSED_OPS[node.op_type].proto(MIN_OPSET), dtypes):
                _lower(bits, op_type, dtype)
        elif node.op_type in _SENSITIVE and dtypes:
            _lower(bits, node.op_type, dtypes[0])
    return bits


def narrowed(before: dict[str, int], after: dict[str, int]) -> str:
    """Return why `after` is less precise than `before`; empty when it is not."""
    for op_type in sorted(before.keys() & after.keys()):
        if after[op_type] < before[op_type]:
            return f"{op_type} would run in {after[op_type]} bits instead of {before[op_type]}"
    return ""


def widened(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """Return the operators that `after` runs in more bits than `before`, such as `Softmax 16 -> 32 bits`."""
    common = sorted(before.keys() & after.keys())
    return [f"{op} {before[op]} -> {after[op]} bits" for op in common if after[op] > before[op]]


def _dtype(value: ir.Value | None, analysis: Analysis) -> ir.DataType | None:
    if value is None:
        return None
    spec = analysis.spec(value, 0)
    return spec.dtype if spec is not None else value.dtype


def _lower(bits: dict[str, int], op_type: str, dtype: ir.DataType | None) -> None:
    if dtype is not None and dtype.is_floating_point():
        bits[op_type] = min(bits.get(op_type, dtype.bitwidth), dtype.bitwidth)


def _inside(function: onnx.FunctionProto, inputs: Sequence[ir.DataType | None]) -> list[tuple[str, ir.DataType | None]]:
    """Return the sensitive operators of a definition with the dtype of their operand."""
    known: dict[str, ir.DataType | None] = dict(zip(function.input, inputs, strict=False))
    found = []
    for node in function.node:
        first = known.get(node.input[0]) if node.input else None
        if node.op_type in _SENSITIVE:
            found.append((node.op_type, first))
        for name in node.output:
            known[name] = _output_dtype(node, known, first)
    return found


def _output_dtype(
    node: onnx.NodeProto, known: dict[str, ir.DataType | None], first: ir.DataType | None
) -> ir.DataType | None:
    if node.op_type == "Cast":
        return ir.DataType(next(a.i for a in node.attribute if a.name == "to"))
    if node.op_type in {"CastLike", "Where"}:
        return known.get(node.input[1])
    return None if node.op_type in _WITHOUT_FLOATS else first
