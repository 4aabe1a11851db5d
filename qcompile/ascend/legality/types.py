"""Element types, and what an operator makes of its inputs' types where ONNX's own inference does not know it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnx import TensorProto

DTYPES: dict[int, str] = {
    TensorProto.FLOAT: "f32", TensorProto.FLOAT16: "f16", TensorProto.BFLOAT16: "bf16", TensorProto.DOUBLE: "f64",
    TensorProto.INT8: "i8", TensorProto.INT16: "i16", TensorProto.INT32: "i32", TensorProto.INT64: "i64",
    TensorProto.UINT8: "u8", TensorProto.UINT16: "u16", TensorProto.UINT32: "u32", TensorProto.UINT64: "u64",
    TensorProto.BOOL: "bool", TensorProto.INT4: "i4", TensorProto.UINT4: "u4", TensorProto.STRING: "string",
    TensorProto.COMPLEX64: "c64", TensorProto.COMPLEX128: "c128", TensorProto.FLOAT8E4M3FN: "f8e4m3",
    TensorProto.FLOAT8E4M3FNUZ: "f8e4m3uz", TensorProto.FLOAT8E5M2: "f8e5m2", TensorProto.FLOAT8E5M2FNUZ: "f8e5m2uz",
    TensorProto.FLOAT4E2M1: "f4",
}  # fmt: skip

# What the ONNX parser of CANN has a device type for; 8-bit floats only in the newest releases.
PARSED = frozenset({"f32", "f16", "bf16", "f64", "i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64", "bool", "i4"})
FLOATS = frozenset({"f16", "bf16", "f32"})

_FIXED: dict[str, tuple[str, ...]] = {
    "Shape": ("i64",), "Size": ("i64",), "NonZero": ("i64",), "ArgMax": ("i64",), "ArgMin": ("i64",),
    "Equal": ("bool",), "Less": ("bool",), "LessOrEqual": ("bool",), "Greater": ("bool",), "GreaterOrEqual": ("bool",),
    "And": ("bool",), "Or": ("bool",), "Not": ("bool",), "Xor": ("bool",), "IsNaN": ("bool",), "IsInf": ("bool",),
    "NPUAscendQuantV2": ("i8",), "NPUDynamicQuant": ("i8", "f32"),
    "NPUDynamicQuantV2": ("i8", "f32", "f32"),
}  # fmt: skip
_DESTINATIONS = {"INT8": "i8", "INT4": "i4", "INT16": "i16"}
# GE's numbering in the dtype attribute of quantized operators.
GE_DTYPES: dict[int, str] = {0: "f32", 1: "f16", 2: "i8", 3: "i32", 27: "bf16"}


def output_dtype(op: str, index: int, inputs: Sequence[str | None], attributes: Mapping[str, Any]) -> str | None:
    """Return the type of one output of a node, or None when it cannot be told."""
    if op in _FIXED:
        return _FIXED[op][index] if index < len(_FIXED[op]) else None
    if op == "AscendQuant":
        return _DESTINATIONS.get(str(attributes.get("dst_type", "INT8")))
    if op == "Cast":
        to = attributes.get("to")
        return DTYPES.get(to) if isinstance(to, int) else None
    if op in {"QuantBatchMatMul", "AscendDequant"}:
        return GE_DTYPES.get(attributes.get("dtype", 1 if op == "QuantBatchMatMul" else 0))
    if op == "NPURmsNorm" and index == 1:
        return "f32"
    if op == "NPUAddRmsNorm" and index == 1:
        return "f32"
    if op == "Where":
        return inputs[1] if len(inputs) > 1 else None
    if op == "TopK" and index == 1:
        return "i64"
    if op == "MatMul" and inputs and inputs[0] == "i8":
        return "i32"
    return inputs[0] if inputs else None
