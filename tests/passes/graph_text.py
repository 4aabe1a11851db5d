"""Small graphs as ONNX text: read them in any float type, write them back as one expression per output, run them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir

from qcompile.ort import open_session
from qcompile.passes.change import register_functions

FLOATS = {"float": onnx.TensorProto.FLOAT, "float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}
_NUMPY = {"float": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# Largest |before - after| over max |before|; a few roundings in half precision.
LIMITS = {"float": 1e-5, "float16": 4e-3}
_SPELLED_ELEMENTS = 4


def read_graph(
    text: str,
    weights: Mapping[str, Sequence[int] | np.ndarray] | None = None,
    dtype: str = "float",
    opset: int = 18,
) -> ir.Model:
    """Parse a graph `(inputs) => (outputs) <constants> { nodes }`; every float in it becomes `dtype`.

    Args:
        text: ONNX text without header and name. `$T` stands for the number of `dtype`, for Cast; a constant or an
            input whose name starts with `f32_` stays float32; `__` in the name of an input stands for a dot.
        weights: Initializers by name: an array, or a shape to fill with random numbers.
        dtype: float, float16 or bfloat16.
        opset: Of the standard domain.
    """
    domains = "".join(
        f', "{domain}" : 1' for domain in ("qcompile", "com.microsoft", "pkg.torch") if f"{domain}." in text
    )
    header = f'<ir_version: 10, opset_import: ["" : {opset}{domains}]>'
    proto = onnx.parser.parse_model(f"{header}\ng {text.replace('$T', str(int(FLOATS[dtype])))}")
    for name, value in (weights or {}).items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        array = value if isinstance(value, np.ndarray) else rng.standard_normal(tuple(value)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    for info in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        if info.type.tensor_type.elem_type == onnx.TensorProto.FLOAT and not info.name.startswith("f32_"):
            info.type.tensor_type.elem_type = FLOATS[dtype]
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and not tensor.name.startswith("f32_"):
            array = onnx.numpy_helper.to_array(tensor).astype(_NUMPY[dtype])
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    model = ir.from_proto(proto)
    register_functions(model)
    for value in model.graph.inputs:
        value.name = (value.name or "").replace("__", ".")
    return model


def expressions(model: ir.Model) -> dict[str, str]:
    """Write every output as an expression of inputs, weights (by name) and small constants (by value)."""
    return {value.name or "": _expression(value) for value in model.graph.outputs}


def _expression(value: ir.Value | None) -> str:
    if value is None:
        return "-"
    tensor, node = value.const_value, value.producer()
    if tensor is not None and tensor.size <= _SPELLED_ELEMENTS:
        return _number(tensor.numpy().astype(np.float64) if tensor.dtype.is_floating_point() else tensor.numpy())
    if node is None:
        return value.name or ""
    parts = [_expression(v) for v in node.inputs]
    parts += [f"{a.name}={_attribute(a)}" for a in sorted(node.attributes.values(), key=lambda a: a.name)]
    domain = "" if node.domain in {"", "ai.onnx"} else f"{node.domain}::"
    index = f".{node.outputs.index(value)}" if len(node.outputs) > 1 else ""
    return f"{domain}{node.op_type}({', '.join(parts)}){index}"


def _number(array: np.ndarray) -> str:
    if array.ndim == 0:
        return f"{array.item():.5g}" if array.dtype.kind == "f" else str(array.item())
    return f"[{', '.join(_number(x) for x in array)}]"


def _attribute(attribute: ir.Attr) -> str:
    if attribute.type == ir.AttributeType.FLOAT:
        return f"{attribute.as_float():.5g}"
    return str(list(attribute.value)) if isinstance(attribute.value, tuple) else str(attribute.value)


def draw_feeds(model: ir.Model, batch: int, length: int, past: int = 0, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs: rows are padded on the left by 0, 1, 2, … tokens; other symbolic dims get numbers of their own."""
    rng = np.random.default_rng(seed)
    sizes = {"batch_size": batch, "sequence_length": length, "past_sequence_length": past}
    sizes["total_sequence_length"] = past + length
    padding = np.minimum(np.arange(batch), past + length - 1)
    mask = (np.arange(past + length)[None] >= padding[:, None]).astype(np.int64)
    control = {"attention_mask": mask, "position_ids": np.maximum(mask.cumsum(1) - 1, 0)[:, past:]}
    feeds = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        assert value.dtype is not None
        shape = [d if isinstance(d, int) else sizes.setdefault(str(d.value), 3 + len(sizes)) for d in value.shape]
        if value.name in control:
            array = control[value.name]
        elif value.dtype.is_floating_point():
            array = rng.standard_normal(shape)
        else:
            array = rng.integers(0, 2, shape)
        feeds[value.name or ""] = array.astype(value.dtype.numpy())
    return feeds


def run_graph(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Run a model on ONNX Runtime without its optimizers."""
    names = {value.name for value in model.graph.inputs}
    session = open_session(ir.to_proto(model).SerializeToString())
    return [np.asarray(x) for x in session.run(None, {k: v for k, v in feeds.items() if k in names})]


def relative_error(before: np.ndarray, after: np.ndarray) -> float:
    """Largest difference relative to the largest number before."""
    assert before.shape == after.shape
    assert before.dtype == after.dtype
    if not before.size:
        return 0.0
    a, b = before.astype(np.float64), after.astype(np.float64)
    return float(np.abs(a - b).max() / max(float(np.abs(a).max()), 1e-30))


def model_bytes(model: ir.Model) -> bytes:
    """The whole model, weights included, as bytes that say every difference."""
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))
