"""Edits of an exported decoder as protobuf, and what every edited graph is held to."""

from collections.abc import Callable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnxruntime

from qcompile.pipeline import OptimizeOptions, OptimizeReport, optimize

Edit = Callable[[onnx.ModelProto], None]
DTYPES = {1: np.float32, 6: np.int32, 7: np.int64, 9: np.bool_, 10: np.float16, 16: ml_dtypes.bfloat16}
# (batch, new tokens, past tokens)
CALLS = ((1, 5, 0), (2, 3, 4))
FUSED = {"fuse-rms-norm": 5, "fuse-swiglu": 2, "fuse-attention": 2, "fuse-qkv": 2, "fuse-gate-up": 2}
NORM, PROJECTION, WEIGHT = "layers.0.input_norm.rms", "layers.0.attn.q_proj.matmul", "model.norm.weight"


def fuse(path: Path, target: str = "portable", **options) -> OptimizeReport:
    return optimize(path, path.parents[1] / "out", OptimizeOptions(target=target, **options))


def counts(report: OptimizeReport) -> dict[str, int]:
    return {name: report.count(name) for name in FUSED}


def run(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    wanted = {value.name for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, {k: v for k, v in feeds.items() if k in wanted}), strict=True))


def feeds_for(path: Path, batch: int, length: int, past: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    feeds: dict[str, np.ndarray] = {}
    for value in onnx.load(path, load_external_data=False).graph.input:
        dtype = DTYPES[value.type.tensor_type.elem_type]
        if value.name == "input_ids":
            feeds[value.name] = rng.integers(0, 500, (batch, length)).astype(dtype)
        elif value.name == "attention_mask":
            feeds[value.name] = np.ones((batch, past + length), dtype)
        elif value.name == "position_ids":
            feeds[value.name] = np.tile(np.arange(past, past + length), (batch, 1)).astype(dtype)
        elif value.name.startswith("past_key_values."):
            feeds[value.name] = rng.standard_normal((batch, 2, past, 16)).astype(dtype)
    return feeds


def assert_unharmed(path: Path, calls: tuple[tuple[int, int, int], ...] = CALLS, limit: float = 1e-4) -> None:
    for call in calls:
        feeds = feeds_for(path, *call)
        before, after = run(path, feeds), run(path.parents[1] / "out" / "model.onnx", feeds)
        assert before.keys() == after.keys()
        for name, array in before.items():
            assert array.shape == after[name].shape, name
            np.testing.assert_allclose(after[name], array, rtol=0, atol=limit * max(1, np.abs(array).max(initial=0)))


def nodes_of(text: str, **names: str) -> list[onnx.NodeProto]:
    """Parse nodes; a name in capitals stands for one that the text form cannot spell (`layers.0.norm`)."""
    graph = onnx.parser.parse_graph(f"g () => () {{ {text} }}")
    _rename(graph, names)
    return list(graph.node)


def _rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    for each in graph.node:
        each.input[:] = [names.get(name, name) for name in each.input]
        for attribute in each.attribute:
            if attribute.HasField("g"):
                _rename(attribute.g, names)


def output(name: str, elem_type: int = 1) -> onnx.ValueInfoProto:
    info = onnx.ValueInfoProto(name=name)
    info.type.tensor_type.elem_type = elem_type
    return info


def append(text: str, *outputs: str, **names: str) -> Edit:
    def edit(proto: onnx.ModelProto) -> None:
        proto.graph.node.extend(nodes_of(text, **names))
        proto.graph.output.extend(output(name) for name in outputs)

    return edit


def in_front(text: str, replaced: str, by: str) -> Edit:
    """Add nodes after the one that gives `replaced`, which they call VALUE; all others read `by` instead."""

    def edit(proto: onnx.ModelProto) -> None:
        nodes = list(proto.graph.node)
        for user in nodes:
            user.input[:] = [by if name == replaced else name for name in user.input]
        new = nodes_of(text, VALUE=replaced)
        at = 1 + next((i for i, n in enumerate(nodes) if replaced in n.output), -1)
        del proto.graph.node[:]
        proto.graph.node.extend([*nodes[:at], *new, *nodes[at:]])

    return edit


def inputs(proto: onnx.ModelProto) -> Iterator[tuple[str, int, onnx.TensorShapeProto.Dimension]]:
    for value in (*proto.graph.input, *proto.graph.output):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            yield value.name, axis, dim


def fixed(batch: int | None = None, length: int | None = None, past: int | None = None) -> Edit:
    sizes = {"batch_size": batch, "sequence_length": length, "past_sequence_length": past}
    sizes["total_sequence_length"] = length + past if length and past is not None else None

    def edit(proto: onnx.ModelProto) -> None:
        for _, _, dim in inputs(proto):
            if sizes.get(dim.dim_param) is not None:
                dim.dim_value = sizes[dim.dim_param]

    return edit
