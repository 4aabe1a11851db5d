"""Store scales in half precision where that is exact, and let them be widened when the model is loaded.

    scales float32 [N, G] or [N]   ->   Cast(scales float16)
    b float32 [N], gamma [D]       ->   Cast(b float16), beside such scales, where all its numbers are float16 numbers

CPU kernels want scales of the activations' type. One float32 per group of 32 is a whole bit per weight; half precision is
what GGUF and Ascend keep. Weights that were quantized for it (`WeightScheme.scale_type`) have scales that are float16
numbers already, so nothing changes but the file. Biases and norms of a checkpoint in bfloat16 mostly are too. The Cast is
of a constant: ONNX Runtime folds it once, at load.
`widen_scales` takes it back for passes that want the scales to be constants.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.errors import QuantError
from qcompile.passes.base import Pass, PassContext, PassResult
from qcompile.passes.change import finish_rewrites
from qcompile.tensors import Array, NarrowableTensor, StreamedTensor
from qcompile.weights import rows_of

_WIDENED = ".widened"
_SMALLEST_VECTOR = 512  # numbers: below that, the Cast and the longer names take more than is saved


class NarrowScales(Pass):
    """Scales, and the biases and norms beside them."""

    name = "narrow-scales"
    summary = "scales, biases and norms that are float16 numbers -> stored as such, widened at load"

    def call(self, context: PassContext, result: PassResult) -> None:
        """Replace every initializer whose numbers were rounded to a narrower type when they were made, then what fits one."""
        graph = context.model.graph
        for value in list(graph.initializers.values()):
            tensor = value.const_value
            if isinstance(tensor, NarrowableTensor) and tensor.exact_in != tensor.dtype:
                self._replace(graph, value, _narrowed_scales(value.name or "", tensor), result)
        if not result.rewrites:
            return
        for value in list(graph.initializers.values()):
            vector = _narrowed_vector(value)
            if vector is not None:
                self._replace(graph, value, vector, result)
        finish_rewrites(context)

    def _replace(self, graph: ir.Graph, value: ir.Value, stored: ir.TensorProtocol, result: PassResult) -> None:
        result.matches += 1
        _narrow(graph, value, stored)
        result.rewrites += 1


def _narrowed_scales(name: str, tensor: NarrowableTensor) -> ir.TensorProtocol:
    return StreamedTensor(
        lambda start, stop: _exact(tensor.rows(start, stop), tensor.exact_in, name),
        tensor.exact_in,
        tensor.shape,
        name=f"{name}.{tensor.exact_in.name.lower()}",
        row_multiple=tensor.row_multiple,
        piece_bytes=tensor.piece_bytes // 2,
    )


def _narrowed_vector(value: ir.Value) -> ir.TensorProtocol | None:
    """Return a vector as float16 if it is long enough, and every number of it is one."""
    tensor = value.const_value
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) != 1 or tensor.size < _SMALLEST_VECTOR:
        return None
    wide = tensor.numpy()
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float16)
    return ir.tensor(narrow, name=f"{value.name}.float16") if np.array_equal(narrow.astype(np.float32), wide) else None


def _narrow(graph: ir.Graph, value: ir.Value, stored: ir.TensorProtocol) -> None:
    name, tensor = value.name or "", value.const_value
    assert tensor is not None
    narrow = ir.Value(name=stored.name, type=ir.TensorType(stored.dtype), shape=value.shape, const_value=stored)
    cast = ir.node("Cast", [narrow], {"to": int(tensor.dtype)}, name=f"{name}{_WIDENED}")
    wide = cast.outputs[0]
    wide.type, wide.shape = ir.TensorType(tensor.dtype), value.shape
    uses = list(value.uses())
    if not uses:
        return
    graph.register_initializer(narrow)
    graph.insert_before(next(iter(graph)), cast)
    for node, index in uses:
        node.replace_input_with(index, wide)
    del graph.initializers[name]


def widen_scales(graph: ir.Graph) -> None:
    """Make initializers again of all scales that were narrowed, whichever run of qcompile did it."""
    for cast in list(graph):
        name = cast.name or ""
        narrow = cast.inputs[0] if cast.op_type == "Cast" and name.endswith(_WIDENED) else None
        tensor = narrow.const_value if narrow is not None else None
        if narrow is None or tensor is None or len(narrow.uses()) != 1:
            continue
        wide = _wide(tensor, cast.outputs[0], name.removesuffix(_WIDENED))
        value = ir.Value(name=wide.name, type=ir.TensorType(wide.dtype), shape=wide.shape, const_value=wide)
        graph.register_initializer(value)
        ir.convenience.replace_all_uses_with(cast.outputs[0], value)
        graph.remove(cast, safe=True)
        del graph.initializers[narrow.name or ""]


def _wide(tensor: ir.TensorProtocol, output: ir.Value, name: str) -> NarrowableTensor:
    dtype = output.dtype or ir.DataType.FLOAT
    numpy_type = dtype.numpy()

    def rows(start: int, stop: int) -> Array:
        return rows_of(tensor, start, stop).astype(numpy_type)

    return NarrowableTensor(rows, dtype, ir.Shape(tensor.shape.numpy()), tensor.dtype, name=name)


def _exact(rows: Array, dtype: ir.DataType, name: str) -> Array:
    narrow = rows.astype(dtype.numpy())
    if not np.array_equal(narrow.astype(rows.dtype), rows):
        raise QuantError(f"{name}: its scales are no {dtype.name} numbers although they were rounded to be")
    return narrow
