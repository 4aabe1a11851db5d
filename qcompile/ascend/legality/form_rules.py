"""Rules about the form of standard nodes: Slice, Split, Trilu, Cast, value_info, infinities in constants."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx

from qcompile.ascend.chips import Cann
from qcompile.ascend.legality.finding import Finding
from qcompile.ascend.legality.rule import REFUSED, SLOW, WRONG, Context, ModelRule, NodeRule, about, about_model
from qcompile.ascend.legality.types import DTYPES, FLOATS, output_dtype
from qcompile.ascend.legality.view import Node

_MAX_SCANNED_BYTES = 64 << 20
_MAX_WEIGHT_BYTES = 1 << 20  # larger weights are not read
_WEIGHT_READERS = frozenset({"MatMul", "Gemm", "Gather", "Transpose", "Conv"})
_FLOAT16_MAX = 65504.0
_DEVICE_OPS = ("NPU", "Ascend", "Quant", "WeightQuant")


def slice_form(context: Context, node: Node) -> Iterator[Finding]:
    """Positive axes with explicit steps of 1 failed as StridedSliceD (310P, CANN 8.1)."""
    if node.op != "Slice" or len(node.inputs) < 5:
        return
    axes, steps = context.view.constant(node.input(3)), context.view.constant(node.input(4))
    if axes is None or steps is None or node.input(0) is None:
        return
    foldable = all(value is None or value.is_foldable for value in node.inputs)
    if not foldable and bool((axes >= 0).any()) and bool((steps == 1).all()):
        yield about(
            node,
            "slice-form",
            "E20001",
            certain=context.chip.family == "310P" and context.cann <= Cann(8, 1),
            seen=f"axes {axes.tolist()} with explicit steps {steps.tolist()}",
            wanted="negative axes and no steps",
            cure="count the axes from the end and leave steps out",
        )


def split_form(context: Context, node: Node) -> Iterator[Finding]:
    """Split takes its sizes as an input; num_outputs of opset 18 was refused by CANN 8.1."""
    if node.op != "Split":
        return
    attributes, opset = node.attributes, context.view.opset("") or 0
    if "num_outputs" in attributes and context.cann < Cann(8, 5):
        yield about(
            node,
            "split-num-outputs",
            "E11010",
            seen="the attribute num_outputs",
            wanted="the sizes as second input (opset 13 form)",
            cure="write Split with its sizes",
        )
    if "split" in attributes and opset >= 13:
        yield about(
            node,
            "split-attribute",
            "E11010",
            seen=f"the attribute split at opset {opset}",
            wanted="the sizes as second input",
            cure="write Split with its sizes as an input",
        )
    yield from _split_sizes(context, node)


def _split_sizes(context: Context, node: Node) -> Iterator[Finding]:
    sizes_value, data = node.input(1), node.input(0)
    if sizes_value is None:
        return
    sizes = context.view.constant(sizes_value)
    if sizes is None:
        if not sizes_value.is_foldable:
            yield about(
                node,
                "split-sizes",
                "E10055",
                certain=False,
                seen="sizes computed in the graph",
                wanted="a constant",
                cure="fold them: static graphs know their sizes",
            )
        return
    axis = node.integer("axis", 0)
    shape = data.shape if data is not None else None
    dim = shape[axis] if shape and -len(shape) <= axis < len(shape) else None
    if dim is not None and int(sizes.sum()) != dim:
        yield about(
            node,
            "split-sizes",
            "E14001",
            seen=f"sizes {sizes.tolist()} for a dimension of {dim}",
            wanted="sizes that add up to it",
            cure="correct the sizes",
        )


def trilu_form(context: Context, node: Node) -> Iterator[Finding]:
    """Trilu has no AI-core kernel, and CANN 8.0 refuses its second input."""
    if node.op != "Trilu" or all(v is None or v.is_foldable for v in node.inputs):
        return
    refused = context.cann <= Cann(8, 0) and node.input(1) is not None
    yield about(
        node,
        "trilu",
        "E11010" if refused else "W11001",
        effect=REFUSED if refused else SLOW,
        seen=f"Trilu{' with k' if node.input(1) is not None else ''}",
        wanted="a mask computed before the graph",
        cure="pass the mask as an input, or fold it into a constant",
    )


def cast_to_int8(context: Context, node: Node) -> Iterator[Finding]:
    """The 310B has no Cast to int8."""
    outputs = [value for value in node.outputs if value is not None]
    if node.op == "Cast" and context.chip.family == "310B" and any(v.dtype == "i8" for v in outputs):
        yield about(
            node,
            "cast-to-int8",
            "EZ3002",
            seen="Cast to i8",
            wanted=f"AscendQuant on {context.chip.name}",
            cure="use AscendQuant with scale 1 and offset 0",
        )


def value_info(context: Context, node: Node) -> Iterator[Finding]:
    """The type of a device operator's output that nothing states is read as float32."""
    if not node.op.startswith(_DEVICE_OPS):
        return
    for value in node.outputs:
        if value is None or value.is_declared or value.is_foldable:
            continue
        yield about(
            node,
            "value-info-missing",
            "EZ3002",
            certain=node.op == "AscendDequant",
            seen=f"no type stated for '{value.name}' ({value.dtype or 'unknown'})",
            wanted="a value_info entry: without one it is read as float32",
            cure="write value_info for every interior value",
        )
        return


def untyped_values(context: Context) -> Iterator[Finding]:
    """Standard operators: CANN infers their types, but starts from float32 where nothing is stated."""
    missing = [
        value.name
        for node in context.view.nodes
        for value in node.outputs
        if value is not None and not value.is_declared and not value.is_foldable and value.dtype != "f32"
        if not node.in_subgraph and not node.op.startswith(_DEVICE_OPS)
    ]
    if missing:
        yield about_model(
            "value-info-incomplete",
            "",
            name=missing[0],
            effect=SLOW,
            certain=False,
            seen=f"{len(missing)} interior values that are not float32 and have no stated type, such as '{missing[0]}'",
            wanted="value_info for every interior value: without it a type is first read as float32",
            cure="run shape inference before saving (`qcompile optimize` writes value_info)",
        )


def stated_type(context: Context, node: Node) -> Iterator[Finding]:
    """The type stated for a value must be the one its node makes."""
    dtypes = [value.dtype if value is not None else None for value in node.inputs]
    for index, value in enumerate(node.outputs):
        if value is None or not value.is_declared or node.op not in _TYPED:
            continue
        made = output_dtype(node.op, index, dtypes, node.attributes)
        if made is not None and value.dtype != made:
            yield about(
                node,
                "value-info-wrong",
                "EZ3002",
                seen=f"'{value.name}' is stated as {value.dtype}",
                wanted=f"{made}, which {node.op} makes",
                cure="correct the value_info entry (AscendDequant: set dtype to 1 for f16)",
            )


_TYPED = frozenset({"Cast", "AscendDequant", "AscendQuant", "QuantBatchMatMul", "NPUDynamicQuant", "NPUAscendQuantV2",
                    "NPURmsNorm", "NPURotaryMul", "Equal", "Less", "Greater", "Shape", "ArgMax"})  # fmt: skip


def infinities(context: Context) -> Iterator[Finding]:
    """Infinite and NaN constants: a row of -inf makes NaN of a softmax, and weights are clipped to fp16 silently."""
    for value in context.view.values.values():
        if value.tensor is None or value.dtype not in FLOATS:
            continue
        is_weight = all(reader.op in _WEIGHT_READERS for reader in value.readers)
        numbers = context.view.constant(value, _MAX_WEIGHT_BYTES if is_weight else _MAX_SCANNED_BYTES)
        if numbers is None or bool(np.isfinite(numbers.astype(np.float32, copy=False)).all()):
            continue
        reader = value.readers[0] if value.readers else None
        yield about_model(
            "infinite-constant",
            "",
            name=value.name,
            effect=WRONG,
            seen=f"'{value.name}' ({value.dtype}, read by {reader.name if reader else 'nothing'}) is not finite",
            wanted="a finite minimum such as -65504",
            cure="write masks with -65504 (fp16) or -1e4, never -inf",
        )


def infinite_fill(context: Context, node: Node) -> Iterator[Finding]:
    """ConstantOfShape with an infinite or NaN value, such as a mask of -inf."""
    fill = next((a.t for a in node.proto.attribute if a.name == "value" and a.HasField("t")), None)
    if node.op != "ConstantOfShape" or fill is None or DTYPES.get(fill.data_type) not in FLOATS:
        return
    try:
        number = onnx.numpy_helper.to_array(fill).astype(np.float32)
    except (ValueError, TypeError):
        return
    if not bool(np.isfinite(number).all()):
        yield about(
            node,
            "infinite-constant",
            "",
            effect=WRONG,
            seen=f"a tensor filled with {float(number.ravel()[0]):g}",
            wanted="a finite minimum such as -65504",
            cure="write masks with -65504 (fp16) or -1e4, never -inf",
        )


def overflowing_cast(context: Context, node: Node) -> Iterator[Finding]:
    """A constant beyond fp16's range becomes infinite when it is cast."""
    outputs = [value for value in node.outputs if value is not None]
    if node.op not in {"Cast", "CastLike"} or not any(v.dtype == "f16" for v in outputs):
        return
    source = node.input(0)
    numbers = context.view.constant(source, _MAX_SCANNED_BYTES) if source and source.dtype in FLOATS else None
    if numbers is None or numbers.size == 0:
        return
    largest = float(np.abs(numbers.astype(np.float32, copy=False)).max())
    if np.isfinite(largest) and largest > _FLOAT16_MAX:
        yield about(
            node,
            "cast-overflow",
            "",
            effect=WRONG,
            seen=f"a constant of {largest:.4g} cast to f16",
            wanted="at most 65504",
            cure="write masks with -65504",
        )


FORM_RULES: tuple[NodeRule, ...] = (
    slice_form,
    split_form,
    trilu_form,
    cast_to_int8,
    value_info,
    stated_type,
    infinite_fill,
    overflowing_cast,
)
FORM_MODEL_RULES: tuple[ModelRule, ...] = (infinities, untyped_values)
