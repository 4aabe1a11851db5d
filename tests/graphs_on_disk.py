"""Small models written to disk, for the tests of the writer, the reader and the compiled-model directory."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.artifact import save_model
from qcompile.runtime.manifest import ModelShape
from qcompile.tensors import StreamedTensor

SHAPE = ModelShape("qwen2", 10, 1, 2, 1, 4, 128)


def model_of(*tensors: ir.TensorProtocol) -> ir.Model:
    """A graph that passes its input through, with initializers."""
    x = ir.Value(name="input_ids", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch_size"]))
    node = ir.node("Identity", [x], name="logits")
    node.outputs[0].name = "logits"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape(["batch_size"])
    values = [
        ir.Value(name=t.name, type=ir.TensorType(t.dtype), shape=ir.Shape(t.shape.numpy()), const_value=t)
        for t in tensors
    ]
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=values, opset_imports={"": 18}, name="toy")
    return ir.Model(graph, ir_version=10)


def streamed(array: np.ndarray, name: str = "w", **options: Any) -> StreamedTensor:
    dtype = ir.DataType.from_numpy(array.dtype)
    return StreamedTensor(lambda i, j: array[i:j], dtype, ir.Shape(array.shape), name=name, **options)


def weight(model: ir.Model, name: str) -> ir.TensorProtocol:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor


def saved_weight(directory: Path, name: str = "w") -> Path:
    """Save a model with one external weight; returns the .onnx path."""
    path = directory / "model.onnx"
    save_model(model_of(ir.Tensor(np.arange(4096, dtype=np.float32), name=name)), path)
    return path


@contextmanager
def file_size_limit(size_bytes: int) -> Iterator[None]:
    """Let no file grow beyond a size, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
