"""Graphs of the kind the lowering makes, written as ONNX text, and the means to break them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser

HALF = np.float16


def parsed(
    body: str,
    inputs: str = "float16[1,8,64] x",
    outputs: str = "float16[1,8,64] y",
    values: str = "",
    imports: str = '"" : 16',
    functions: str = "",
) -> onnx.ModelProto:
    """Parse one graph; a name that nothing declares is an initializer to be added with `constants`."""
    text = (
        f"<ir_version: 8, opset_import: [{imports}]> main ({inputs}) => ({outputs}) <{values}> {{ {body} }} {functions}"
    )
    return onnx.parser.parse_model(text)


def constants(model: onnx.ModelProto, **arrays: np.ndarray) -> onnx.ModelProto:
    """Add initializers."""
    for name, array in arrays.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
    return model


def ones(*shape: int, dtype: type = HALF) -> np.ndarray:
    return np.ones(shape, dtype)


def saved(model: onnx.ModelProto, directory: Path, name: str = "model.onnx") -> Path:
    path = directory / name
    path.write_bytes(model.SerializeToString())
    return path


def packed_scale(values: np.ndarray) -> np.ndarray:
    """TransQuantParamV2: f32 bits without the low 13, bit 46 set."""
    bits = values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000)
    return bits.astype(np.uint64) | np.uint64(1 << 46)


def plain_scale(values: np.ndarray) -> np.ndarray:
    """AMCT: f32 bits in the low 32."""
    return values.astype(np.float32).view(np.uint32).astype(np.uint64)


def norm_model(op: str = "NPURmsNorm", attributes: str = "", **options: str) -> onnx.ModelProto:
    return constants(parsed(f"y = {op} {attributes} (x, gamma)", **options), gamma=ones(64))


_LAYER_BODY = """
    n, rstd = NPURmsNorm (x, gamma)
    qkv = MatMul (n, w_qkv)
    q, k, v = Split <axis = -1> (qkv, sizes)
    q4 = Reshape (q, q_shape)
    k4 = Reshape (k, k_shape)
    qr = NPURotaryMul (q4, cos, sin)
    kr = NPURotaryMul (k4, cos, sin)
    qt = Transpose <perm = [0, 2, 1, 3]> (qr)
    keys = Concat <axis = 1> (past_k, kr)
    kt = Transpose <perm = [0, 2, 3, 1]> (keys)
    scores = MatMul (qt, kt)
    masked = Add (scores, mask)
    p = Softmax <axis = -1> (masked)
    v4 = Reshape (v, k_shape)
    values = Concat <axis = 1> (past_v, v4)
    vt = Transpose <perm = [0, 2, 1, 3]> (values)
    o = MatMul (p, vt)
    ot = Transpose <perm = [0, 2, 1, 3]> (o)
    flat = Reshape (ot, x_shape)
    out = MatMul (flat, w_o)
    h = Add (x, out)
    last = Slice (h, start, stop, last_axis)
    n2, rstd2, h2 = NPUAddRmsNorm (h, out, gamma)
    y = Add (n2, h2)
"""
_LAYER_INPUTS = (
    "float16[2,1,64] x, float16[2,1,1,16] cos, float16[2,1,1,16] sin, float16[2,1,1,17] mask, "
    "float16[2,16,4,16] past_k, float16[2,16,4,16] past_v"
)
_LAYER_OUTPUTS = "float16[2,1,64] y, float16[2,1,4,16] kr, float16[2,1,4,16] v4, float16[2,1,32] last"
_LAYER_VALUES = (
    "float16[2,1,64] n, float[2,1,1] rstd, float16[2,1,192] qkv, float16[2,1,64] q, float16[2,1,64] k, "
    "float16[2,1,64] v, float16[2,1,4,16] q4, float16[2,1,4,16] k4, float16[2,1,4,16] qr, float16[2,4,1,16] qt, "
    "float16[2,17,4,16] keys, float16[2,4,16,17] kt, float16[2,4,1,17] scores, float16[2,4,1,17] masked, "
    "float16[2,4,1,17] p, float16[2,17,4,16] values, float16[2,4,17,16] vt, float16[2,4,1,16] o, "
    "float16[2,1,4,16] ot, float16[2,1,64] flat, float16[2,1,64] out, float16[2,1,64] h, float16[2,1,64] n2, "
    "float[2,1,1] rstd2, float16[2,1,64] h2"
)


def attention_layer() -> onnx.ModelProto:
    """One decoder layer of a decode graph: two rows, one token each, cache of 16, fp16, all types stated."""
    shapes = {"q_shape": [2, 1, 4, 16], "k_shape": [2, 1, 4, 16], "x_shape": [2, 1, 64], "sizes": [64, 64, 64]}
    numbers = {"start": [0], "stop": [32], "last_axis": [-1]}
    int64 = {name: np.array(v, np.int64) for name, v in (shapes | numbers).items()}
    model = parsed(_LAYER_BODY, _LAYER_INPUTS, _LAYER_OUTPUTS, _LAYER_VALUES)
    return constants(model, gamma=ones(64), w_qkv=ones(64, 192), w_o=ones(64, 64), **int64)


def dynamic_w8a8() -> onnx.ModelProto:
    body = """
        q, scale = NPUDynamicQuant (x)
        y = QuantBatchMatMul <dtype = 1> (q, w, ws, , , scale)
    """
    values = "int8[8,64] q, float[8] scale"
    model = parsed(body, "float16[8,64] x", "float16[8,32] y", values)
    return constants(model, w=ones(64, 32, dtype=np.int8), ws=ones(32, dtype=np.float32))


def static_w8a8() -> onnx.ModelProto:
    body = """
        q = NPUAscendQuantV2 (x, inverse)
        y = QuantBatchMatMul <dtype = 1> (q, w, scale, , bias)
    """
    model = parsed(body, "float16[8,64] x", "float16[8,32] y", "int8[8,64] q")
    model = constants(model, inverse=ones(1), w=ones(64, 32, dtype=np.int8), bias=ones(32, dtype=np.int32))
    return constants(model, scale=packed_scale(np.full(32, 0.01)))


def ascend_quant() -> onnx.ModelProto:
    body = """
        q = AscendQuant <scale = 20.0, offset = 0.0, dst_type = "INT8"> (x)
        s = MatMul (q, w)
        y = AscendDequant <dtype = 1> (s, deq)
    """
    model = parsed(body, "float16[8,64] x", "float16[8,32] y", "int8[8,64] q, int32[8,32] s")
    return constants(model, w=ones(64, 32, dtype=np.int8), deq=plain_scale(np.full(32, 0.01)))


def weight_only(group: int = 32, inner: int = 64) -> onnx.ModelProto:
    body = f"y = NPUWeightQuantBatchMatmulV2 <antiquant_group_size = {group}> (x, w, scale)"
    model = parsed(body, f"float16[8,{inner}] x", "float16[8,48] y")
    groups = -(-inner // group) if group else 1
    return constants(model, w=ones(inner, 48, dtype=np.int8), scale=ones(groups, 48))


def packed_int4() -> onnx.ModelProto:
    """Weight-only with eight 4-bit weights in an int32."""
    model = weight_only()
    kept = [tensor for tensor in model.graph.initializer if tensor.name != "w"]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return constants(model, w=ones(64, 6, dtype=np.int32))


def flash_attention(inputs: str = "q, k, v, pse, mask", attributes: str = "") -> onnx.ModelProto:
    given = {"num_heads": "4", "input_layout": '"BNSD"', "num_key_value_heads": "2"}
    given |= {"pre_tokens": "2147483647", "next_tokens": "2147483647"}
    given.update(part.split("=") for part in attributes.split(";") if part)
    spelled = ", ".join(f"{name} = {value}" for name, value in given.items() if value)
    model = parsed(
        f"y = NPUPromptFlashAttention <{spelled}> ({inputs})",
        "float16[1,4,128,64] q, float16[1,2,128,64] k, float16[1,2,128,64] v, bool[1,1,128,128] mask",
        "float16[1,4,128,64] y",
    )
    return constants(model, pse=np.zeros((1, 4, 128, 128), HALF))


CLEAN = {
    "norm": norm_model,
    "attention layer": attention_layer,
    "dynamic w8a8": dynamic_w8a8,
    "static w8a8": static_w8a8,
    "AscendQuant": ascend_quant,
    "weight only": weight_only,
    "packed int4": packed_int4,
    "flash attention": flash_attention,
}
