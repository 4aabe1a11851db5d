"""SmoothQuant and AWQ folded into norms and up projections: the same model, less error after rounding."""

from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.passes import fold_scales
from qcompile.passes.base import PassContext
from qcompile.passes.fold_scales import Awq, SmoothQuant
from qcompile.passes.proof import Prover
from qcompile.passes.quantize_int4 import QuantizeInt4
from qcompile.passes.quantize_int8 import QuantizeInt8Dynamic
from qcompile.quant.scheme import InputStatistics
from qcompile.quantize_options import QuantizeOptions
from tests.optimized import export_tiny, optimize_tiny
from tests.passes.graph_text import read_graph, run_graph
from tests.passes.six_tests import Example, NearMiss, SixTests

X, Y = "float[batch_size, sequence_length, 64]", "float[batch_size, sequence_length, 48]"
SIGNATURE = f"({X} x) => ({Y} y)"
NORM = "qcompile.RmsNorm<epsilon = 0.000001>"
RNG = np.random.default_rng(3)
GAMMA = np.abs(RNG.standard_normal(64)).astype(np.float32) + 0.5
GAMMA[5] = 40
WEIGHTS = {"g": GAMMA, "w": RNG.standard_normal((64, 48)).astype(np.float32) / 8}
UP = RNG.standard_normal((64, 64)).astype(np.float32) / 8
UP[:, 9] *= 40
FEED = {"gate": RNG.standard_normal((64, 64)).astype(np.float32) / 8, "up": UP, "w": WEIGHTS["w"]}
PACKED = {"both": np.concatenate([FEED["gate"], UP], axis=1), "sizes": np.array([64, 64]), "w": FEED["w"]}
BIAS = RNG.standard_normal(128).astype(np.float32)


class Outlier:
    """Inputs of which one channel is forty times the others."""

    def __init__(self, channel):
        self.channel, self.prepared = channel, 0

    def prepare(self, model):
        self.prepared += 1

    def __call__(self, projection):
        x = np.random.default_rng(1).standard_normal((64, projection.num_inputs)).astype(np.float32)
        x[:, self.channel] *= 40
        magnitude = np.abs(x)
        return InputStatistics(len(x), magnitude.max(axis=0), magnitude.mean(axis=0), x.T @ x, x)


EXAMPLES = (
    Example("norm and projection", f"{SIGNATURE} {{ n = {NORM}(x, g) y = MatMul(n, w) }}", None, WEIGHTS),
    Example(
        "a norm read twice, once with a bias",
        f"({X} x) => ({Y} y, {Y} z) {{ n = {NORM}(x, g) y = MatMul(n, w) z = qcompile.Linear(n, v, b) }}",
        None,
        {**WEIGHTS, "v": RNG.standard_normal((64, 48)).astype(np.float32) / 8, "b": (48,)},
    ),
    Example(
        "a sum and its norm",
        f"({X} x, {X} u) => ({Y} y, {X} r) {{ n, r = qcompile.AddRmsNorm<epsilon = 0.000001>(x, u, g) y = MatMul(n, w) }}",
        None,
        WEIGHTS,
    ),
    Example(
        "feed-forward",
        f"{SIGNATURE} {{ a = MatMul(x, gate) u = MatMul(x, up) p = qcompile.SwiGlu(a, u) y = MatMul(p, w) }}",
        None,
        FEED,
    ),
    Example(
        "feed-forward with one packed projection",
        f"{SIGNATURE} {{ t = MatMul(x, both) a, u = Split<axis = -1>(t, sizes) p = qcompile.SwiGlu(a, u) y = MatMul(p, w) }}",
        None,
        PACKED,
    ),
    Example(
        "the same with biases",
        f"""{SIGNATURE} {{ t = qcompile.Linear(x, both, b) a, u = Split<axis = -1>(t, sizes)
        p = qcompile.SwiGlu(a, u) y = MatMul(p, w) }}""",
        None,
        {**PACKED, "b": BIAS},
    ),
)
NEAR_MISSES = (
    NearMiss(
        "something else reads the norm",
        f"({X} x) => ({Y} y, {X} z) {{ n = {NORM}(x, g) y = MatMul(n, w) z = Neg(n) }}",
        None,
        WEIGHTS,
    ),
    NearMiss(
        "the norm is an output", f"({X} x) => ({Y} y, {X} n) {{ n = {NORM}(x, g) y = MatMul(n, w) }}", None, WEIGHTS
    ),
    NearMiss(
        "the weight is read twice",
        f"({X} x, {X} u) => ({Y} y, {Y} z) {{ n = {NORM}(x, g) y = MatMul(n, w) z = MatMul(u, w) }}",
        None,
        WEIGHTS,
    ),
    NearMiss(
        "the factor is computed by no projection",
        f"({X} x) => ({Y} y) {{ a = MatMul(x, gate) u = Exp(x) p = qcompile.SwiGlu(a, u) y = MatMul(p, w) }}",
        None,
        {k: FEED[k] for k in ("gate", "w")},
    ),
    NearMiss(
        "gamma is computed",
        f"({X} x, float[64] g) => ({Y} y) {{ n = {NORM}(x, g) y = MatMul(n, w) }}",
        None,
        {"w": (64, 48)},
    ),
)


class Folding(SixTests):
    examples = EXAMPLES
    near_misses = NEAR_MISSES
    counts = (("qwen2-builder", 0),)
    limits: ClassVar = {"float": 2e-5, "float16": 5e-3}

    @classmethod
    def run(cls, context):
        channel = 9 if any(n.op_type == "SwiGlu" for n in context.model.graph) else 5
        return cls.pass_class(statistics=Outlier(channel))(context)


class TestSmoothQuant(Folding):
    pass_class = SmoothQuant


class TestAwq(Folding):
    pass_class = Awq


def rounding_error(example, folding, rounding):
    """Return the squared error of y after rounding, with and without the folding."""
    rng = np.random.default_rng(7)
    feeds = {"x": rng.standard_normal((2, 32, 64)).astype(np.float32)}
    wanted = run_graph(read_graph(example.before, example.weights), feeds)[0]
    errors = []
    for passes in ((rounding,), (folding, rounding)):
        context = PassContext(read_graph(example.before, example.weights), Prover())
        for step in passes:
            step(context)
        errors.append(float(((run_graph(context.model, feeds)[0] - wanted) ** 2).sum()))
    return errors


@pytest.mark.parametrize(
    ("folding", "rounding"),
    [
        (lambda: SmoothQuant(statistics=Outlier(5)), lambda: QuantizeInt8Dynamic()),
        (lambda: Awq(statistics=Outlier(5)), lambda: QuantizeInt4()),
    ],
)
def test_rounding_loses_less_afterwards(folding, rounding):
    plain, folded = rounding_error(EXAMPLES[0], folding(), rounding())
    assert folded < 0.6 * plain


def test_a_wrong_scale_is_rolled_back(monkeypatch):
    right = fold_scales._divided
    monkeypatch.setattr(
        fold_scales, "_divided", lambda gamma, scale, name: right(gamma, scale * np.float32(1.01), name)
    )
    context = Folding.prepared(EXAMPLES[0].before, WEIGHTS, "float", 18)
    result = SmoothQuant(statistics=Outlier(5))(context)
    assert result.rewrites == 0
    assert result.rejected[0].reason.startswith("rolled back")


@pytest.mark.parametrize(
    ("step", "options"),
    [
        (SmoothQuant, QuantizeOptions(activations="float")),
        (Awq, QuantizeOptions(bits=8, symmetric=True)),
        (Awq, QuantizeOptions(keep_float=("*",))),
    ],
)
def test_what_is_not_rounded_is_not_scaled(step, options):
    context = Folding.prepared(EXAMPLES[0].before, WEIGHTS, "float", 18)
    statistics = Outlier(5)
    result = step(options, statistics)(context)
    assert (result.matches, result.rewrites, statistics.prepared) == (0, 0, 0)
    assert "not rounded in a way" in step(options, statistics).explain(context)[0].reason


def test_rows_and_columns_are_of_one_matrix():
    context = Folding.prepared(EXAMPLES[4].before, PACKED, "float", 18)
    Awq(statistics=Outlier(9))(context)
    scaled = [v.const_value for v in context.model.graph.initializers.values() if hasattr(v.const_value, "columns")]
    assert len(scaled) == 2
    for tensor in scaled:
        whole = tensor.numpy()
        np.testing.assert_array_equal(tensor.columns(3, 11), whole[:, 3:11].T)
        np.testing.assert_array_equal(tensor.rows(2, 9), whole[2:9])


@pytest.mark.parametrize(("folding", "scheme"), [("smooth-quant", "int8-dynamic"), ("awq", "int4")])
def test_the_whole_path_on_a_tiny_model(tmp_path, folding, scheme):
    report = optimize_tiny(export_tiny(tmp_path, "qwen2"), tmp_path / "out", "fuse", folding, scheme)
    result = next(r for r in report.results if r.name == folding)
    assert result.matches > 0
    assert result.rewrites == len(result.detail.get("folded", {}))
    assert result.rewrites + len(result.rejected) == result.matches
    names = {*result.detail.get("folded", {}), *(rejection.node for rejection in result.rejected)}
    assert len(names) == result.matches
    assert "layers.1.attn.qkv_proj" in names
    assert not any(r.reason.startswith("rolled back") for r in result.rejected)
    assert ir.load(tmp_path / "out" / "model.onnx").graph is not None
