"""Lower int8 activations times int8 weights to ONNX Runtime's integer matrix product.

    LinearW8A8(x, W, s)             step  = ReduceMax(|x|) / 127                                one per row
                                    codes = QuantizeLinear(x, step, 128), a row is a block      uint8
                                    y     = MatMulIntegerToFloat(codes, W, 1, s, 128) * step
    LinearW8A8Static(x, W, s, t)    y     = MatMulIntegerToFloat(QuantizeLinear(x, t, 128), W, t, s, 128)
    … + b                           y     = MatMulIntegerToFloat(QuantizeLinear(x, t, 128), W, t, s, 128, , b)

What gives QuantizeLinear a 128 for every row comes from the token ids where x has one row per token: these nodes are the same
for all Linears of a model, and the pass that merges equal nodes leaves one of each.

QuantizeLinear divides, rounds, clips and narrows in one pass over x, and MatMulIntegerToFloat applies the weights' scales
while it writes: spelled in single operators the same takes a quarter longer. Blocks came with opset 21; along axis 0 of a
matrix, as before it, two Reshapes and a third of the nodes come on top, 1 to 3 % of a decode step. Activations must be
uint8: int8 times int8 has no fast kernel and is 100 times slower.

A row of zeros has step 0: whatever its codes are, they are multiplied by 0 again.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir

from qcompile.functions import DOMAIN, MIN_OPSET
from qcompile.passes.base import Pass, PassContext, PassResult
from qcompile.passes.change import finish_rewrites, named_constant
from qcompile.passes.kernel_rewrite import MICROSOFT, Kernel, first_columns, lower, matrix_shape
from qcompile.quantized_functions import LINEAR_W8A8, LINEAR_W8A8_STATIC

# The same codes and exact sums; only their scaling is in another order. Where a quotient falls between two codes to the
# last bit, the two may round it differently: one code of 127.
MAX_RELATIVE_ERROR = 2e-4
_BLOCKS_OPSET = 21


class LowerQuantizedActivationsToOrt(Pass):
    """Linears with int8 activations."""

    name = "lower-quantized-activations-to-ort"
    summary = "LinearW8A8 -> QuantizeLinear, per row or by one step, and MatMulIntegerToFloat"

    def call(self, context: PassContext, result: PassResult) -> None:
        """Lower each, proved against the function; keep the function where the proof fails."""
        for node in list(context.model.graph):
            if node.domain != DOMAIN or node.op_type not in (LINEAR_W8A8.name, LINEAR_W8A8_STATIC.name):
                continue
            if node.op_type == LINEAR_W8A8_STATIC.name:
                lower(context, result, node, _static, first_columns, MAX_RELATIVE_ERROR, _bias_of(node))
            else:
                make = partial(_dynamic, ids=_ids_of(context, node))
                lower(context, result, node, make, first_columns, MAX_RELATIVE_ERROR)
        if result.rewrites:
            finish_rewrites(context)


def _ids_of(context: PassContext, node: ir.Node) -> ir.Value | None:
    """Return the token ids [B, S] if x is [B, S, M]: what counts rows is then the same for all Linears, and merged to one."""
    ids = next((v for v in context.model.graph.inputs if v.name == "input_ids"), None)
    seen = context.analysis.specs(_input(node, 0))
    wanted = context.analysis.specs(ids) if ids is not None else None
    if seen is None or wanted is None:
        return None
    return ids if all(a.shape[:-1] == b.shape for a, b in zip(seen, wanted, strict=True)) else None


def _bias_of(node: ir.Node) -> ir.Node | None:
    """Return the Add of a constant per output that is all that reads a Linear, if the kernel's type is the graph's."""
    readers = list(node.outputs[0].uses())
    add = readers[0].node if len(readers) == 1 and not node.outputs[0].is_graph_output() else None
    if add is None or add.op_type != "Add" or add.domain or _is_half(node):
        return None
    bias = next((v.const_value for v in add.inputs if v is not None and v.const_value is not None), None)
    is_vector = bias is not None and tuple(bias.shape.numpy()) == (matrix_shape(_input(node, 1))[1],)
    return add if is_vector else None


def _dynamic(node: ir.Node, graph: ir.Graph, ids: ir.Value | None) -> Kernel:
    num_inputs, _ = matrix_shape(_input(node, 1))
    wide, x = _widened(node)
    magnitude = ir.node("Abs", [x])
    largest = ir.node("ReduceMax", [magnitude.outputs[0], _vector(graph, "axes", -1)], {"keepdims": 1})
    step = ir.node("Div", [largest.outputs[0], named_constant(graph, "code.127.0", np.array(127, np.float32))])
    rows = [ir.node("Shape", [step.outputs[0] if ids is None else ids])]
    if ids is not None:
        rows.append(ir.node("Concat", [rows[0].outputs[0], _vector(graph, "dim", 1)], {"axis": 0}))
    middles = ir.node("Expand", [_middle(graph), rows[-1].outputs[0]])
    one_block = {"axis": -1, "block_size": num_inputs}
    codes = ir.node("QuantizeLinear", [x, step.outputs[0], middles.outputs[0]], one_block)
    product = _product(node, graph, codes, named_constant(graph, "step.1", np.array(1, np.float32)))
    scaled = ir.node("Mul", [product.outputs[0], step.outputs[0]])
    return _narrowed(node, [*wide, magnitude, largest, step, *rows, middles, codes, product, scaled], _BLOCKS_OPSET)


def _static(node: ir.Node, graph: ir.Graph, bias: ir.Value | None = None) -> Kernel:
    wide, source = _widened(node)
    step = _input(node, 3)
    codes = ir.node("QuantizeLinear", [source, step, _middle(graph)])
    return _narrowed(node, [*wide, codes, _product(node, graph, codes, step, bias)])


def _product(node: ir.Node, graph: ir.Graph, codes: ir.Node, step: ir.Value, bias: ir.Value | None = None) -> ir.Node:
    weight, scales = _input(node, 1), _input(node, 2)
    inputs: list[ir.Value | None] = [codes.outputs[0], weight, step, _float_scales(graph, scales), _middle(graph)]
    if bias is not None:
        inputs += [None, bias]  # weights are symmetric and have no zero point
    return ir.node("MatMulIntegerToFloat", inputs, domain=MICROSOFT)


def _is_half(node: ir.Node) -> bool:
    return _input(node, 2).dtype == ir.DataType.FLOAT16


def _widened(node: ir.Node) -> tuple[list[ir.Node], ir.Value]:
    """Return x as float32, which is what the kernels take, and the Cast for it if there is one."""
    x = _input(node, 0)
    if not _is_half(node):
        return [], x
    cast = ir.node("Cast", [x], {"to": int(ir.DataType.FLOAT)})
    return [cast], cast.outputs[0]


def _narrowed(node: ir.Node, nodes: list[ir.Node], opset: int = MIN_OPSET) -> Kernel:
    if _is_half(node):
        nodes.append(ir.node("Cast", [nodes[-1].outputs[0]], {"to": int(ir.DataType.FLOAT16)}))
    return Kernel(nodes, opset=opset)


def _float_scales(graph: ir.Graph, scales: ir.Value) -> ir.Value:
    if scales.dtype != ir.DataType.FLOAT16:
        return scales
    tensor = scales.const_value
    assert tensor is not None
    name = f"{scales.name}.float"
    if name not in graph.initializers:
        wide = ir.tensor(tensor.numpy().astype(np.float32), name=name)
        kind = ir.TensorType(wide.dtype)
        graph.register_initializer(ir.Value(name=name, type=kind, shape=tensor.shape, const_value=wide))  # type: ignore[arg-type]
    return graph.initializers[name]


def _middle(graph: ir.Graph) -> ir.Value:
    """The code of zero."""
    return named_constant(graph, "code.128", np.array(128, np.uint8))


def _vector(graph: ir.Graph, name: str, *numbers: int) -> ir.Value:
    return named_constant(graph, f"{name}.{'x'.join(map(str, numbers))}", np.array(numbers, dtype=np.int64))


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value
