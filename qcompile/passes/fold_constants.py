"""Fold what is the same in every case: computed constants, and shape arithmetic that always gives the same numbers.

A value is folded when it is computed from constants alone, or when it is integer shape arithmetic whose result agrees in
all cases (head counts, head_dim / 2, fixed Slice bounds). Values that hang on attention_mask or position_ids are left
alone even when they agree, and so are comparisons: a branch on the length (dynamic NTK) must stay.
Nothing is folded whose result is larger than its inputs and than `MAX_FOLDED_BYTES`: folding must not grow the file.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.passes.base import Pass, PassContext, PassResult

MAX_FOLDED_BYTES = 64 << 10
_MAX_SHAPE_ELEMENTS = 64
# Shape arithmetic. Comparisons and Where are missing on purpose: see the module docstring.
_SHAPE_OPS = {
    "Shape", "Size", "Gather", "Slice", "Concat", "Unsqueeze", "Squeeze", "Reshape", "Cast", "Identity", "Add", "Sub",
    "Mul", "Div", "Mod", "Neg", "Max", "Min", "ReduceProd", "Flatten", "Split", "Floor", "Ceil", "ConstantOfShape",
}  # fmt: skip


class FoldConstants(Pass):
    """Constants and constant shape arithmetic."""

    name = "fold-constants"
    summary = "what computes the same constant in every case"

    def call(self, context: PassContext, result: PassResult) -> None:
        """Replace folded values by initializers; dead producers are removed by eliminate-dead-code."""
        graph, analysis = context.model.graph, context.analysis
        constant: set[ir.Value] = set()
        shape_only: set[ir.Value] = set()
        for node in list(graph):
            if _widens(node):
                continue
            # Of what it casts like, CastLike reads the dtype only.
            operands = node.inputs[:1] if node.op_type == "CastLike" else node.inputs
            inputs = [v for v in operands if v is not None]
            from_constants = bool(inputs) and all(v.const_value is not None or v in constant for v in inputs)
            from_shapes = node.op_type == "Shape" or all(
                v.const_value is not None or v in constant or v in shape_only for v in inputs
            )
            for value in node.outputs:
                if from_constants:
                    constant.add(value)
                elif from_shapes and node.op_type in _SHAPE_OPS and node.domain == "":
                    shape_only.add(value)
                else:
                    continue
                if _is_known_large(value):
                    continue
                arrays = analysis.values(value)
                if arrays is None or not _is_foldable(value, arrays, from_constants):
                    continue
                result.matches += 1
                result.rewrites += _fold(context, value, arrays[0])
        if result.rewrites:
            graph.sort()


def _is_known_large(value: ir.Value) -> bool:
    """Whether the shape alone says that a value is too large to fold: it need not be computed then."""
    if value.shape is None or value.dtype is None or not value.shape.is_static():
        return False
    return int(np.prod(value.shape.numpy())) * value.dtype.bitwidth > 8 * MAX_FOLDED_BYTES


def _widens(node: ir.Node) -> bool:
    """Whether a node makes wide numbers of a constant in half precision: it is stored so to keep the file small."""
    source = node.inputs[0] if node.op_type == "Cast" else None
    tensor = source.const_value if source is not None else None
    if tensor is None or tensor.dtype != ir.DataType.FLOAT16 or tensor.size <= _MAX_SHAPE_ELEMENTS:
        return False
    return node.attributes["to"].as_int() == int(ir.DataType.FLOAT)


def _is_foldable(value: ir.Value, arrays: list[np.ndarray], from_constants: bool) -> bool:
    first = arrays[0]
    if value.is_graph_output() or not value.uses():
        return False
    if any(a.shape != first.shape or a.dtype != first.dtype or not np.array_equal(a, first) for a in arrays[1:]):
        return False
    if from_constants:
        return bool(first.nbytes <= MAX_FOLDED_BYTES)
    return bool(first.size <= _MAX_SHAPE_ELEMENTS)


def _fold(context: PassContext, value: ir.Value, array: np.ndarray) -> int:
    graph = context.model.graph
    name = f"{value.name}.folded"
    folded = ir.Value(
        name=name,
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        shape=ir.Shape(array.shape),
        const_value=ir.tensor(array, name=name),
    )
    graph.register_initializer(folded)
    ir.convenience.replace_all_uses_with(value, folded)
    return 1
