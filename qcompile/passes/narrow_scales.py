"""Store scales in half precision where that is exact, and let ONNX Runtime widen them when it loads the model.

    scales float32 [N, G]   ->   Cast(scales float16 [N, G])

The CPU kernels want scales of the activations' type. One float32 per group of 32 is a whole bit per weight; half precision
is what GGUF and Ascend keep. Weights that were quantized for it (`WeightScheme.scale_type`) have scales that are float16
numbers already, so nothing changes but the file. The Cast is of a constant: it is folded once, at load.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.errors import QuantError
from qcompile.passes.base import Pass, PassContext, PassResult
from qcompile.passes.change import finish_rewrites
from qcompile.tensors import Array, NarrowableTensor, StreamedTensor


class NarrowScales(Pass):
    """Scales of blocks."""

    name = "narrow-scales"
    summary = "scales that are float16 numbers -> stored as such, widened at load"

    def call(self, context: PassContext, result: PassResult) -> None:
        """Replace every initializer whose numbers were rounded to a narrower type when they were made."""
        graph = context.model.graph
        for value in list(graph.initializers.values()):
            tensor = value.const_value
            if isinstance(tensor, NarrowableTensor) and tensor.exact_in != tensor.dtype:
                result.matches += 1
                _narrow(graph, value, tensor)
                result.rewrites += 1
        if result.rewrites:
            finish_rewrites(context)


def _narrow(graph: ir.Graph, value: ir.Value, tensor: NarrowableTensor) -> None:
    name = value.name or ""
    kind = ir.TensorType(tensor.exact_in)
    stored = StreamedTensor(
        lambda start, stop: _exact(tensor.rows(start, stop), tensor.exact_in, name),
        tensor.exact_in,
        tensor.shape,
        name=f"{name}.{tensor.exact_in.name.lower()}",
        row_multiple=tensor.row_multiple,
        piece_bytes=tensor.piece_bytes // 2,
    )
    narrow = ir.Value(name=stored.name, type=kind, shape=tensor.shape, const_value=stored)
    cast = ir.node("Cast", [narrow], {"to": int(tensor.dtype)}, name=f"{name}.widened")
    wide = cast.outputs[0]
    wide.type, wide.shape = ir.TensorType(tensor.dtype), tensor.shape
    uses = list(value.uses())
    if not uses:
        return
    graph.register_initializer(narrow)
    graph.insert_before(next(iter(graph)), cast)
    for node, index in uses:
        node.replace_input_with(index, wide)
    del graph.initializers[name]


def _exact(rows: Array, dtype: ir.DataType, name: str) -> Array:
    narrow = rows.astype(dtype.numpy())
    if not np.array_equal(narrow.astype(rows.dtype), rows):
        raise QuantError(f"{name}: its scales are no {dtype.name} numbers although they were rounded to be")
    return narrow
