"""Rules about quantized operators: sizes, group sizes, combinations of types, the packing of scales."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from qcompile.ascend.legality.finding import Finding
from qcompile.ascend.legality.rule import REFUSED, SLOW, WRONG, Context, NodeRule, about, shape_text
from qcompile.ascend.legality.types import GE_DTYPES
from qcompile.ascend.legality.view import Node, Shape, Value

_MAX_DIM = 65535
_WEIGHT_ONLY = frozenset({"NPUWeightQuantBatchMatmulV2", "WeightQuantBatchMatmulV2"})
_TRANS_QUANT_BIT = np.uint64(1) << np.uint64(46)
_DROPPED_MANTISSA = np.uint64(0x1FFF)
_PASS_THROUGH = frozenset({"Reshape", "Identity", "Transpose", "Add", "Unsqueeze", "Squeeze"})
_BIAS_BY_SCALE = {"u64": {"i32"}, "i64": {"i32"}, "f32": {"i32", "f32"}, "bf16": {"i32", "bf16", "f32"}}


def quant_matmul(context: Context, node: Node) -> Iterator[Finding]:
    """QuantBatchMatMul: flat activations, last dimensions of at most 65535, scales by output type."""
    if node.op != "QuantBatchMatMul":
        return
    x1, x2 = node.input(0), node.input(1)
    if x1 is not None and x1.shape is not None and len(x1.shape) != 2:
        yield _limit(
            node, "quant-rank", f"x1 {shape_text(x1.shape)}", "[M,K]", "flatten the activations", certain=False
        )
    for name, value in (("x1", x1), ("x2", x2)):
        last = value.shape[-1] if value is not None and value.shape else None
        if last is not None and last > _MAX_DIM:
            cure = "store x2 as [N,K] with transpose_x2 = 1, or leave the layer in fp16"
            yield _limit(node, "quant-dimension", f"last dimension of {name} is {last}", f"at most {_MAX_DIM}", cure)
    yield from _inner_dimension(node, x1, x2)
    yield from _row_and_column_lengths(node, x1, x2)
    yield from _scale_types(context, node)
    if context.chip.family == "310P":
        yield from _on_310p(node)


def _inner_dimension(node: Node, x1: Value | None, x2: Value | None) -> Iterator[Finding]:
    if x1 is None or x2 is None or not x1.shape or not x2.shape or len(x2.shape) < 2:
        return
    given = node.attributes
    inner = x1.shape[-2] if given.get("transpose_x1") and len(x1.shape) > 1 else x1.shape[-1]
    other = x2.shape[-1] if given.get("transpose_x2") else x2.shape[-2]
    if None not in (inner, other) and inner != other:
        seen = f"x1 {shape_text(x1.shape)}, x2 {shape_text(x2.shape)}"
        yield about(node, "quant-shape", "E14001", seen=seen, wanted="one K", cure="check transpose_x2")


def _row_and_column_lengths(node: Node, x1: Value | None, x2: Value | None) -> Iterator[Finding]:
    """One scale (or one per column), one bias per column, one pertoken_scale per row."""
    given = node.attributes
    rows = x1.shape[-1 if given.get("transpose_x1") else -2] if x1 and x1.shape and len(x1.shape) > 1 else None
    columns = x2.shape[-2 if given.get("transpose_x2") else -1] if x2 and x2.shape and len(x2.shape) > 1 else None
    for index, name, wanted in ((2, "scale", {1, columns}), (4, "bias", {columns}), (5, "pertoken_scale", {rows})):
        value = node.input(index)
        if value is None or not value.is_static or not value.shape or None in wanted or value.shape[-1] in wanted:
            continue
        lengths = " or ".join(str(length) for length in sorted(filter(None, wanted)))
        seen = f"{name} {shape_text(value.shape)}"
        yield about(node, "scale-shape", "E14001", seen=seen, wanted=f"{lengths} of them", cure="correct it")


def _scale_types(context: Context, node: Node) -> Iterator[Finding]:
    scale, offset, bias, per_token = (node.input(i) for i in (2, 3, 4, 5))
    made = GE_DTYPES.get(node.attributes.get("dtype", 1))
    if scale is None or scale.dtype is None or made is None:
        return
    allowed = {"u64": {"f16", "i8"}, "i64": {"f16", "i8"}, "f32": {"bf16", "f16", "i32"}, "bf16": {"bf16", "i32"}}
    if made not in allowed.get(scale.dtype, set()):
        seen = f"scale {scale.dtype} for output {made}"
        yield _types(node, seen, "uint64 for f16 or i8; f32 for bf16, f16 per token, i32", "change dtype or the scale")
    elif scale.dtype == "f32" and made == "f16" and per_token is None:
        yield _types(
            node, "an f32 scale for f16 without pertoken_scale", "pertoken_scale f32 [M]", "or a packed uint64 scale"
        )
    elif made == "i8" and offset is None:
        yield _types(node, "output i8 without offset", "offset f32", "connect it")
    if offset is not None and made != "i8":
        yield _types(node, f"an offset for output {made}", "offset for i8 only", "leave it out, or set dtype to 2")
    if per_token is not None and scale.dtype in {"u64", "i64"}:
        yield _types(node, f"pertoken_scale with a {scale.dtype} scale", "an f32 scale", "use f32 scales per token")
    biases = _BIAS_BY_SCALE.get(scale.dtype, set()) | (
        {made} if scale.dtype == "f32" and made in {"f16", "bf16"} else set()
    )
    if bias is not None and bias.dtype not in (None, *biases):
        wanted = ", ".join(sorted(biases))
        yield _types(node, f"bias {bias.dtype} with scale {scale.dtype}", wanted, "convert the bias")
    yield from _packed_scale(context, node, scale)


def _packed_scale(context: Context, node: Node, scale: Value) -> Iterator[Finding]:
    packed = context.view.constant(scale) if scale.dtype in {"u64", "i64"} else None
    if packed is None or packed.size == 0:
        return
    bits = np.ascontiguousarray(packed).view(np.uint64)
    if not bool((bits & _TRANS_QUANT_BIT).all()) or bool((bits & _DROPPED_MANTISSA).any()):
        yield about(
            node,
            "scale-packing",
            "",
            effect=WRONG,
            seen="a uint64 scale without bit 46, or with its low 13 bits set",
            wanted="f32 bits with the low 13 cleared, and bit 46 set",
            cure="pack it as TransQuantParamV2 does; AscendDequant's packing is another one",
        )


def _on_310p(node: Node) -> Iterator[Finding]:
    scale = node.input(2)
    if scale is not None and scale.dtype not in {"u64", "i64", None}:
        yield _types(node, f"scale {scale.dtype} on 310P", "uint64 or int64", "use static scales")
    seen = "x2 in ND on 310P"
    cure = "use AscendQuant, MatMul, AscendDequant"
    yield _limit(node, "quant-310p", seen, "x2 in FRACTAL_NZ, which ONNX cannot say", cure, code="EZ3002")


def weight_only(context: Context, node: Node) -> Iterator[Finding]:
    """Weight-only MatMul: groups of 32, k and n of at most 65535, scales shaped by group."""
    if node.op not in _WEIGHT_ONLY:
        return
    x, weight, scale = node.input(0), node.input(1), node.input(2)
    group = node.attributes.get("antiquant_group_size", 0)
    shape = _unpacked_shape(weight)
    if isinstance(group, int) and (group % 32 or (shape and shape[0] is not None and group >= shape[0] > 0)):
        inner = shape[0] if shape else None
        wanted = f"0 or a multiple of 32 below K{'' if inner is None else f' = {inner}'}"
        yield _limit(
            node, "group-size", f"antiquant_group_size {group}", wanted, "quantize with groups of 32, 64 or 128"
        )
    if x is not None and x.shape is not None and len(x.shape) != 2:
        yield _limit(node, "quant-rank", f"x {shape_text(x.shape)}", "[M,K]", "flatten the activations")
    for dim in shape or ():
        if dim is not None and dim > _MAX_DIM:
            yield _limit(
                node, "quant-dimension", f"weight {shape_text(shape)}", f"at most {_MAX_DIM}", "leave it in fp16"
            )
    if context.chip.family == "310P" and weight is not None and weight.dtype in {"i4", "i32"}:
        yield _types(node, f"weight {weight.dtype} on 310P", "i8", "quantize to 8 bits for this chip")
    yield from _group_scales(node, shape, scale, group)


def _unpacked_shape(weight: Value | None) -> Shape | None:
    """Eight 4-bit weights are packed into an int32."""
    shape = weight.shape if weight is not None else None
    if weight is None or weight.dtype != "i32" or not shape or shape[-1] is None:
        return shape
    return (*shape[:-1], shape[-1] * 8)


def _group_scales(node: Node, weight: object, scale: Value | None, group: object) -> Iterator[Finding]:
    if not isinstance(weight, tuple) or len(weight) != 2 or scale is None or not scale.is_static or None in weight:
        return
    inner, outer = weight
    allowed = [(1,), (outer,), (1, outer)]
    if isinstance(group, int) and group > 0:
        allowed = [(-(-inner // group), outer)]
    if scale.shape not in allowed:
        wanted = " or ".join(shape_text(shape) for shape in allowed)
        yield about(
            node, "scale-shape", "E14001", seen=f"scale {shape_text(scale.shape)}", wanted=wanted, cure="reshape it"
        )


def ascend_quant(context: Context, node: Node) -> Iterator[Finding]:
    """AscendQuant: a finite scale, and no offset where the MatMul behind it is fused."""
    if node.op != "AscendQuant":
        return
    scale, offset = node.attributes.get("scale"), node.attributes.get("offset", 0.0)
    if isinstance(scale, float) and not (np.isfinite(scale) and scale > 0):
        yield about(
            node, "quant-scale", "E14001", seen=f"scale {scale}", wanted="a positive number", cure="recalibrate"
        )
    yield from _quant_destination(context, node)
    readers = [reader for value in node.outputs if value is not None for reader in value.readers]
    if isinstance(offset, float) and offset and any(reader.op in {"MatMul", "Gemm"} for reader in readers):
        yield about(
            node,
            "quant-offset",
            "",
            effect=WRONG,
            certain=False,
            seen=f"offset {offset:g} before a MatMul",
            wanted="0: the fused MatMul does not take the offset back",
            cure="quantize activations symmetrically, or subtract zero_point * sum(w) after AscendDequant",
        )


def _quant_destination(context: Context, node: Node) -> Iterator[Finding]:
    """CANN's kernel tables: i8 everywhere, i4 on the 910B besides; i16 is a word of the operator that no kernel has."""
    given = node.attributes.get("dst_type", "INT8")
    made = ("INT8", "INT4") if context.chip.family == "910B" else ("INT8",)
    if given not in made:
        yield about(
            node,
            "quant-dst-type",
            "EZ3002",
            certain=given == "INT16",  # of int4 on the smaller chips nothing is known either way
            seen=f"dst_type {given} on {context.chip.name}",
            wanted=" or ".join(made),
            cure="quantize to 8 bits: leave dst_type out, and round weights and scale accordingly",
        )


def ascend_dequant(context: Context, node: Node) -> Iterator[Finding]:
    """AscendDequant: f16 out, a MatMul with constant int8 weights in front, plain f32 bits as scale."""
    if node.op != "AscendDequant":
        return
    if node.attributes.get("dtype", 0) != 1:
        yield about(
            node,
            "dequant-dtype",
            "EZ3002",
            seen=f"dtype {node.attributes.get('dtype', 'absent, which is 0 (f32)')}",
            wanted="1: the kernel makes f16 only",
            cure="set dtype to 1 and state f16 in value_info",
        )
    packed = context.view.constant(node.input(1))
    if packed is not None and packed.dtype == np.uint64 and bool((packed >> np.uint64(32)).any()):
        yield about(
            node,
            "scale-packing",
            "",
            effect=WRONG,
            seen="deq_scale with bits above the low 32",
            wanted="plain f32 bits in the low 32",
            cure="pack it as AMCT does; bit 46 belongs to QuantBatchMatMul",
        )
    source, scale = node.input(0), node.input(1)
    columns = source.shape[-1] if source is not None and source.shape else None
    if scale is not None and scale.is_static and columns is not None and scale.shape not in {(), (1,), (columns,)}:
        seen, wanted = f"deq_scale {shape_text(scale.shape)}", f"one value, or {columns}"
        yield about(node, "scale-shape", "E14001", seen=seen, wanted=wanted, cure="one scale per output column")
    between = list(context.view.walk_back(source, _PASS_THROUGH))
    if between and any(n.op == "Add" for n in between):
        yield about(
            node,
            "dequant-bias",
            "",
            effect=SLOW,
            certain=False,
            seen="an int32 Add between MatMul and AscendDequant",
            wanted="the bias after AscendDequant, in fp16",
            cure="move it: the int32 Add broke the fusion on a device",
        )


def int8_matmul(context: Context, node: Node) -> Iterator[Finding]:
    """MatMul of int8: only between AscendQuant and AscendDequant, with a constant 2-D weight."""
    if node.op not in {"MatMul", "Gemm"}:
        return
    types = [value.dtype if value is not None else None for value in node.inputs[:2]]
    if "i8" not in types:
        return
    weight = node.input(1)
    if weight is not None and (not weight.is_foldable or (weight.shape is not None and len(weight.shape) != 2)):
        on_edge = context.chip.family == "310B"
        yield about(
            node,
            "int8-weight",
            "EZ3002",
            effect=SLOW if on_edge else REFUSED,
            certain=False,
            seen=f"an int8 {node.op} with weight {shape_text(weight.shape)}{'' if weight.is_foldable else ', not constant'}",
            wanted="a constant 2-D weight",
            cure="quantize only projections by constant weights",
        )
    readers = [reader for value in node.outputs if value is not None for reader in value.readers]
    ends = {reader.op for reader in readers} - _PASS_THROUGH
    if readers and not ends <= {"AscendDequant", "AscendRequant"}:
        yield about(
            node,
            "int8-without-dequant",
            "EZ3002",
            certain=False,
            seen=f"int32 sums read by {', '.join(sorted(ends))}",
            wanted="AscendDequant",
            cure="put AscendDequant behind the MatMul, or use QuantBatchMatMul",
        )


def column_scales(context: Context, node: Node) -> Iterator[Finding]:
    """NPUDynamicQuant, NPUAscendQuantV2: factors are one for all, or one per column (of the axis)."""
    if node.op not in {"NPUDynamicQuant", "NPUDynamicQuantV2", "NPUAscendQuantV2"}:
        return
    x, axis = node.input(0), node.integer("axis", -1) if node.op == "NPUAscendQuantV2" else -1
    if x is None or not x.shape:
        return
    if not -len(x.shape) <= axis < len(x.shape):
        seen, wanted = f"axis {axis} of x {shape_text(x.shape)}", f"below {len(x.shape)}"
        yield about(node, "scale-shape", "E14001", seen=seen, wanted=wanted, cure="set axis to -1")
        return
    length = x.shape[axis]
    is_quant = node.op == "NPUAscendQuantV2"
    for value in node.inputs[1:3] if is_quant else node.inputs[1:2]:
        sizes = {1, length} if is_quant else {length}
        if (
            value is not None
            and length is not None
            and value.is_static
            and math.prod(dim or 1 for dim in value.shape or ()) not in sizes
        ):
            seen = f"'{value.name}' {shape_text(value.shape)} for x {shape_text(x.shape)}"
            yield about(node, "scale-shape", "E14001", seen=seen, wanted=f"{length} of them", cure="correct it")


def dynamic_quant(context: Context, node: Node) -> Iterator[Finding]:
    """NPUDynamicQuant: the scale has one value per row."""
    if node.op not in {"NPUDynamicQuant", "NPUDynamicQuantV2"} or len(node.outputs) < 2:
        return
    x, scale = node.input(0), node.outputs[1]
    if x is None or x.shape is None or scale is None or scale.shape is None or not scale.is_declared:
        return
    if tuple(scale.shape) != tuple(x.shape[:-1]):
        yield about(
            node,
            "dynamic-quant-scale",
            "E14001",
            seen=f"scale {shape_text(scale.shape)} for x {shape_text(x.shape)}",
            wanted=shape_text(x.shape[:-1]),
            cure="correct the value_info entry",
        )


def _limit(
    node: Node, rule: str, seen: str, wanted: str, cure: str, *, code: str = "EZ9999", certain: bool = True
) -> Finding:
    return about(node, rule, code, certain=certain, seen=seen, wanted=wanted, cure=cure)


def _types(node: Node, seen: str, wanted: str, cure: str) -> Finding:
    return about(node, "quant-types", "EZ3002", seen=seen, wanted=wanted, cure=cure)


QUANT_RULES: tuple[NodeRule, ...] = (
    quant_matmul,
    weight_only,
    ascend_quant,
    ascend_dequant,
    int8_matmul,
    column_scales,
    dynamic_quant,
)
