"""Graphs that are no decoders: an encoder of any opset, a convolutional net, nothing at all."""

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from qcompile.artifact import load_model
from qcompile.errors import QCompileError, UnsupportedOpError
from qcompile.pipeline import OptimizeOptions, optimize
from qcompile.runtime.manifest import Manifest
from qcompile.verify import compare_directories
from tests.robustness.edits import fuse, run


def text_model(text: str, path: Path, opset: int = 18, **weights: np.ndarray) -> Path:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> {text}')
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    path.parent.mkdir(exist_ok=True)
    onnx.save(proto, path)
    return path


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


ENCODER = """encoder (int64[N, S] ids, float[N, S, 8] residual) => (float[N, S, 8] y) {{
    x = Gather (table, ids) h = Add (x, residual)
    mean = ReduceMean {axes_m} centred = Sub (h, mean) two = Constant <value = float {{2.0}}> ()
    square = Pow (centred, two) spread = ReduceMean {axes_s} eps = Constant <value = float {{0.00001}}> ()
    variance = Add (spread, eps) deviation = Sqrt (variance) normal = Div (centred, deviation)
    scaled = Mul (normal, gamma) shifted = Add (scaled, beta) wide = MatMul (shifted, up) biased = Add (wide, bias)
    root = Constant <value = float {{1.4142135}}> () r = Div (biased, root) e = Erf (r)
    one = Constant <value = float {{1.0}}> () o = Add (e, one) p = Mul (biased, o)
    half = Constant <value = float {{0.5}}> () act = Mul (p, half) z = MatMul (act, down) y = Add (z, h)
}}"""
ENCODER_WEIGHTS = {"table": random(11, 8), "gamma": random(8), "beta": random(8), "up": random(8, 16)}
ENCODER_WEIGHTS |= {"bias": random(16), "down": random(16, 8)}


def encoder(path: Path, opset: int) -> Path:
    if opset < 18:
        axes = {"axes_m": "<axes = [-1]> (h)", "axes_s": "<axes = [-1]> (square)"}
        weights = ENCODER_WEIGHTS
    else:
        axes = {"axes_m": "(h, last)", "axes_s": "(square, last)"}
        weights = ENCODER_WEIGHTS | {"last": np.array([-1])}
    return text_model(ENCODER.format(**axes), path, opset, **weights)


@pytest.mark.parametrize("target", ["portable", "ort"])
@pytest.mark.parametrize("opset", range(11, 22))
def test_an_encoder_of_any_opset_is_fused(tmp_path, opset, target):
    path = encoder(tmp_path / "in" / "model.onnx", opset)
    report = fuse(path, target)
    assert [report.count(name) for name in ("fuse-add-layer-norm", "fuse-gelu", "fuse-linear")] == [1, 1, 1]
    feeds = {"ids": np.array([[1, 10, 3]]), "residual": random(1, 3, 8)}
    before, after = run(path, feeds), run(tmp_path / "out" / "model.onnx", feeds)
    np.testing.assert_allclose(after["y"], before["y"], atol=1e-5)
    manifest = Manifest.load(tmp_path / "out")
    assert (manifest.graphs[0].role, manifest.model.model_type) == ("model", "none")
    assert optimize(tmp_path / "out", tmp_path / "again", OptimizeOptions(target=target)).count("fuse-gelu") == 0


CNN = """cnn (float[N, 3, 9, 9] image) => (float[N, 4] scores) {
    c = Conv <pads = [1, 1, 1, 1]> (image, kernel) b = BatchNormalization (c, s, o, m, v) r = Relu (b)
    p = MaxPool <kernel_shape = [3, 3], strides = [3, 3]> (r) flat = Flatten (p) scores = Gemm <transB = 1> (flat, w, bias)
}"""


def test_a_convolutional_net_passes_through(tmp_path):
    weights = {
        "kernel": random(2, 3, 3, 3),
        "s": random(2),
        "o": random(2),
        "m": random(2),
        "v": np.ones(2, np.float32),
    }
    path = text_model(CNN, tmp_path / "in" / "model.onnx", **weights, w=random(4, 18), bias=random(4))
    fuse(path, "ort")
    feeds = {"image": random(2, 3, 9, 9)}
    seen = run(tmp_path / "out" / "model.onnx", feeds)["scores"]
    np.testing.assert_allclose(seen, run(path, feeds)["scores"], atol=1e-4)


@pytest.mark.parametrize("text", ["g (float[2] x) => (float[2] x) { }", "g () => () { }"], ids=["no nodes", "nothing"])
def test_a_graph_without_nodes_passes_through(tmp_path, text):
    path = text_model(text, tmp_path / "in" / "model.onnx")
    report = fuse(path)
    assert report.ops_after == {}
    assert load_model(tmp_path / "out" / "model.onnx").graph.name == "g"


def test_the_whole_model_is_compared_for_decoders_only(tmp_path):
    path = encoder(tmp_path / "in" / "model.onnx", 18)
    with pytest.raises(UnsupportedOpError, match=r"graph 'encoder' is no decoder .*: use --verify fast"):
        fuse(path, verify="full")
    fuse(path)
    with pytest.raises(QCompileError, match="no graph of role 'decoder'"):
        compare_directories(tmp_path / "out", tmp_path / "out")


def test_a_value_larger_than_memory_is_not_drawn(tmp_path):
    text = """g (float[34359738368, 8] x, float[34359738368, 8] r) => (float[34359738368, 8] y) {
        h = Add (x, r) y = LayerNormalization <axis = -1> (h, gamma, beta) }"""
    path = text_model(text, tmp_path / "in" / "model.onnx", gamma=random(8), beta=random(8))
    report = fuse(path)
    (rejection,) = next(r for r in report.results if r.name == "fuse-layer-norm").rejected
    assert rejection.reason == "rolled back: 'h' is [34359738368, 8] in prefill, too large to prove the rewrite"
