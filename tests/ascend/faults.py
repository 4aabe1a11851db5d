"""How a clean graph is broken: one fault, the rule it breaks, and the code ATC would give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx

from qcompile.ascend.legality.rule import AtcOptions
from tests.ascend.graphs import constants, flash_attention, parsed

Build = Callable[[], onnx.ModelProto]


@dataclass(frozen=True)
class Fault:
    name: str
    build: Build
    rule: str
    code: str
    chip: str = "910b4"
    cann: str = "8.1"
    options: AtcOptions | None = None


def node_of(model: onnx.ModelProto, op: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == op)


def changed(build: Build, change: Callable[[onnx.ModelProto], object]) -> Build:
    def built() -> onnx.ModelProto:
        model = build()
        change(model)
        return model

    return built


def attribute(op: str, **values: float | str | None) -> Callable[[onnx.ModelProto], None]:
    """Set attributes of the first node of an op type; None removes one."""

    def change(model: onnx.ModelProto) -> None:
        node = node_of(model, op)
        for name, value in values.items():
            kept = [a for a in node.attribute if a.name != name]
            del node.attribute[:]
            node.attribute.extend(kept)
            if value is not None:
                kind = {int: "INT", float: "FLOAT", str: "STRING"}[type(value)]
                made = node.attribute.add(name=name, type=kind)
                field = {"INT": "i", "FLOAT": "f", "STRING": "s"}[kind]
                setattr(made, field, value.encode() if isinstance(value, str) else value)

    return change


def replaced(name: str, array: np.ndarray) -> Callable[[onnx.ModelProto], None]:
    """Put another array in the place of an initializer."""

    def change(model: onnx.ModelProto) -> None:
        kept = [t for t in model.graph.initializer if t.name != name]
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)
        constants(model, **{name: array})

    return change


def imports(*pairs: tuple[str, int]) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        del model.opset_import[:]
        for domain, version in pairs:
            model.opset_import.add(domain=domain, version=version)

    return change


def renamed(op: str, to: str, domain: str = "") -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        node = node_of(model, op)
        node.op_type, node.domain = to, domain

    return change


def input_dim(index: int, value: int | str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        dim = model.graph.input[0].type.tensor_type.shape.dim[index]
        if isinstance(value, str):
            dim.dim_param = value
        else:
            dim.dim_value = value

    return change


def without_value_info(model: onnx.ModelProto) -> None:
    del model.graph.value_info[:]


def int64s(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def sliced() -> onnx.ModelProto:
    model = parsed("y = Slice (x, start, stop, axes, steps)", outputs="float16[1,8,32] y")
    return constants(model, start=int64s(0), stop=int64s(32), axes=int64s(2), steps=int64s(1))


def unary(op: str, attributes: str = "", imports: str = '"" : 16', dtype: str = "float16") -> Build:
    typed = f"{dtype}[1,8,64]"
    return lambda: parsed(f"y = {op} {attributes} (x)", f"{typed} x", f"{typed} y", imports=imports)


def rotary(x: str, table: str, op: str = "NPURotaryMul", attributes: str = "") -> Build:
    return lambda: parsed(
        f"y = {op} {attributes} (x, cos, sin)",
        f"float16[{x}] x, float16[{table}] cos, float16[{table}] sin",
        f"float16[{x}] y",
    )


def int64_mask() -> onnx.ModelProto:
    return parsed(
        "s = Add (ids, ids) y = Gather (x, s)", "float16[8,64] x, int64[1,8] ids", "float16[1,8,64] y", "int64[1,8] s"
    )


def bool_mask() -> onnx.ModelProto:
    body = "m = And (a, b) y = Where (m, x, x)"
    return parsed(body, "bool[1,8,64] a, bool[1,8,64] b, float16[1,8,64] x", values="bool[1,8,64] m")


def looped() -> onnx.ModelProto:
    body = """
        n = Constant <value = int64 {3}> ()
        go = Constant <value_int = 1> ()
        c = Cast <to = 9> (go)
        y = Loop <body = step (int64 i, bool more, float16[1,8,64] a) => (bool again, float16[1,8,64] b) {
            again = Identity (more)
            b = Add (a, a)
        }> (n, c, x)
    """
    return parsed(body)


def called_function() -> onnx.ModelProto:
    function = '<domain: "qcompile", opset_import: ["" : 16]> Twice (a) => (b) { b = Add (a, a) }'
    return parsed("y = qcompile.Twice (x)", imports='"" : 16, "qcompile" : 1', functions=function)


def infinite_mask() -> onnx.ModelProto:
    return constants(parsed("y = Add (x, mask)"), mask=np.full((8, 64), -np.inf, np.float16))


def overflowing() -> onnx.ModelProto:
    model = parsed("m = Cast <to = 10> (low) y = Add (x, m)", values="float16[64] m")
    return constants(model, low=np.full(64, -3.4e38, np.float32))


def split(attributes: str, inputs: str, version: int) -> Build:
    def build() -> onnx.ModelProto:
        outputs = "float16[1,8,32] y, float16[1,8,32] z"
        model = parsed(f"y, z = Split <axis = -1{attributes}> ({inputs})", outputs=outputs, imports=f'"" : {version}')
        return constants(model, sizes=int64s(32, 32), wrong=int64s(32, 16)) if "," in inputs else model

    return build


def bfloat_norm() -> onnx.ModelProto:
    return parsed("y = NPURmsNorm (x, g)", "bfloat16[1,8,64] x, bfloat16[64] g", "bfloat16[1,8,64] y")


def dead_output() -> onnx.ModelProto:
    model = parsed(
        "y, = NPURmsNorm (x, g) z = Clip (y, , top)",
        "float16[1,8,64] x, float16[64] g, float16 top",
        "float16[1,8,64] z",
    )
    model.graph.node[0].output.append("")
    return model


def mask_dims(model: onnx.ModelProto, *dims: int) -> None:
    """Give the mask of `flash_attention` another shape."""
    for dim, size in zip(model.graph.input[3].type.tensor_type.shape.dim, dims, strict=True):
        dim.dim_value = size


def lengths_given() -> onnx.ModelProto:
    """Flash attention told the filled lengths instead of a mask alone."""
    model = flash_attention("q, k, v, pse, mask, lengths, lengths")
    return constants(model, lengths=int64s(128))
