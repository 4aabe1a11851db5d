"""Store weights that were quantized before as the codes they were given then: nothing is rounded again.

    MatMul(x, W) | Linear(x, W, b)   ->   LinearW8 | LinearW4(x, codes, scales) [+ b]
    Gather(E, input_ids)             ->   EmbeddingW8 | EmbeddingW4(input_ids, codes, scales)

    codes     int8, or uint8 with two codes of 4 bits in a byte; of 5 or 6 bits they are unpacked from planes, with rows of
              different formats (a packed QKV) one below the other
    scales    a constant, or codes times steps as K-quants store them
    offsets   of an affine grid, W = scales * codes + offsets: (sums of x over blocks) @ offsets^T is added

A dequantized checkpoint (a GGUF file) is such a model. The grid is found in the weights alone (`qcompile.quant.grid`), so it
does not matter who rounded them, or what wrote the graph. What lies on none stays float and is named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import onnx_ir as ir

from qcompile.errors import QuantError
from qcompile.passes.base import Pass, PassContext, PassResult, Rejection
from qcompile.passes.change import finish_rewrites, node_label
from qcompile.passes.grid_nodes import GridWeight, replace_by, store
from qcompile.passes.grid_weights import Segment, find_segments
from qcompile.passes.quantize_projections import Projection, find_projections
from qcompile.quant.grid_rows import Grid
from qcompile.quantize_options import LayerOptions, QuantizeOptions

_KEPT = "kept float, as asked"


class QuantizeLossless(Pass):
    """Weights that lie on a grid."""

    name = "lossless"
    summary = "weights that were quantized before (GGUF) -> their own codes, nothing rounded again"

    def __init__(self, options: QuantizeOptions | None = None) -> None:
        self.keep_float = (options or QuantizeOptions()).keep_float

    def call(self, context: PassContext, result: PassResult) -> None:
        """Store every weight that lies on a grid as codes; name the others."""
        graph = context.model.graph
        projections = find_projections(graph)
        result.matches = len(projections)
        weights: dict[ir.Value, GridWeight | str] = {}
        tensors = []
        for projection in projections:
            source = projection.source
            if source not in weights:
                found = _KEPT if self._keeps(projection) else _segments(projection)
                weights[source] = found if isinstance(found, str) else store(graph, projection, found)
            weight = weights[source]
            if isinstance(weight, str):
                result.rejected.append(Rejection(node_label(projection.node), self.name, weight))
                continue
            tensors.append(_record(projection, weight))
            replace_by(context, projection, weight)
            result.rewrites += 1
        _judge(projections, result)
        result.detail["quantized"] = tensors
        result.detail["formats"] = _formats(w for w in weights.values() if not isinstance(w, str))
        if result.rewrites:
            context.forget_analysis()
            finish_rewrites(context)

    def _keeps(self, projection: Projection) -> bool:
        return any(LayerOptions(pattern).matches(projection.names) for pattern in self.keep_float)


def _segments(projection: Projection) -> list[Segment] | str:
    if projection.dtype != ir.DataType.FLOAT:
        name = projection.dtype.name.lower()
        return f"it is {name}: products of codes and scales were rounded when it was stored; export with --dtype fp32"
    return find_segments(projection)


def _judge(projections: Sequence[Projection], result: PassResult) -> None:
    """Say what stays float; refuse if that is everything."""
    unfit = [rejection for rejection in result.rejected if rejection.reason != _KEPT]
    if not unfit:
        return
    first = f"'{unfit[0].node}': {unfit[0].reason}"
    if len(result.rejected) == len(projections):
        raise QuantError(
            f"lossless: no weight was quantized before: {first}; use --passes int8 or int4, which round weights themselves"
        )
    result.detail["left_float"] = f"{len(unfit)} of {len(projections)} weights stay float, such as {first}"


def _formats(weights: Iterable[GridWeight]) -> dict[str, int]:
    """Return how many weights have each format, rows of several in one counting for each."""
    return dict(Counter(name for w in weights for name in dict.fromkeys(_describe(s.grid) for s in w.segments)))


def _record(projection: Projection, weight: GridWeight) -> dict[str, Any]:
    return {
        "name": projection.name,
        "operator": weight.operator(projection),
        "weight": projection.source.name,
        "shape": [projection.num_outputs, projection.num_inputs],
        "bits": weight.bits,
        "group_size": weight.block,
        "symmetric": weight.offsets is None,
        "activations": "float",
        "algorithm": "lossless",
        "stored": [
            {"rows": [s.start, s.stop], "bits": s.grid.bits, "group_size": s.grid.kind.block, **s.grid.storage()}
            for s in weight.segments
        ],
    }


def _describe(grid: Grid) -> str:
    """Return a format in words: bits, block, offsets."""
    offsets = " with offsets" if grid.kind.is_affine else ""
    return f"{grid.bits} bits in blocks of {grid.kind.block}{offsets}"
