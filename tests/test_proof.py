"""Break rules on purpose: a proof must see each break, roll it back without a trace and say how large it was."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.artifact import load_model
from qcompile.functions import DOMAIN
from qcompile.passes import fuse_attention, pack
from qcompile.passes.base import Pass, PassContext, PassResult
from qcompile.passes.canonicalize_arithmetic import CanonicalizeArithmetic, DivByConstantToMul, PowToMul
from qcompile.passes.canonicalize_projections import CanonicalizeProjections, GemmToMatMul
from qcompile.passes.fuse_add_rms_norm import AddRmsNorm, FuseAddRmsNorm
from qcompile.passes.fuse_attention import Attention, FuseAttention
from qcompile.passes.fuse_gate_up import FuseGateUp
from qcompile.passes.fuse_gelu import FuseGelu, GeluErf
from qcompile.passes.fuse_layer_norm import FuseLayerNorm, LayerNormChain
from qcompile.passes.fuse_linear import FuseLinear, Linear
from qcompile.passes.fuse_qkv import FuseQkv
from qcompile.passes.fuse_rms_norm import FuseRmsNorm, RmsNormChain
from qcompile.passes.fuse_rotary_embedding import FuseRotaryEmbedding, RotaryChain
from qcompile.passes.fuse_swiglu import FuseSwiGlu, SwiGlu
from qcompile.passes.lower_to_ort import LowerGelu, LowerToOrt
from qcompile.passes.proof import Prover
from qcompile.passes.rule import scalar
from qcompile.verify import compare_directories
from qcompile.weights import concat_columns
from tests.optimized import export_tiny, optimize_tiny
from tests.passes.graph_text import expressions, model_bytes, read_graph
from tests.passes.heads import ANGLE_CONSTANTS, ANGLES, STEPS, attention, rotary
from tests.passes.norms import ADDED, SHAPE, SIGNATURE, layer_norm, rms_norm
from tests.passes.six_tests import TIDY
from tests.passes.test_fuse_gate_up import graph as gate_up
from tests.passes.test_fuse_qkv import MATMULS
from tests.passes.test_fuse_qkv import graph as qkv

LIMIT = 2e-5
ROLLED_BACK = re.compile(r"rolled back: (?P<case>.+): relative error (?P<error>\S+) > 2e-05")
HEADS = "float[batch_size, 3, sequence_length, 8]"
GRAPHS = {
    "rms norm": rms_norm(),
    "layer norm": layer_norm(),
    "sum and norm": f"{ADDED} {{ h = Add(x, residual) y = qcompile.RmsNorm<epsilon = 0.125>(h, gamma) }}",
    "projection": f"{SIGNATURE} {{ p = MatMul(x, w) y = Add(p, beta) }}",
    "gemm": "(float[batch_size, 8] x) => (float[batch_size, 8] y) { y = Gemm<transB = 1>(x, w, beta) }",
    "gate": f"({SHAPE} gate, {SHAPE} up) => ({SHAPE} y) {{ s = Sigmoid(gate) g = Mul(gate, s) y = Mul(g, up) }}",
    "gelu": f"{SIGNATURE} <float r = {{0.70710678}}, float one = {{1}}, float half = {{0.5}}>"
    " { a = Mul(x, r) e = Erf(a) f = Add(e, one) h = Mul(x, half) y = Mul(h, f) }",
    "fused gelu": f"{SIGNATURE} {{ y = qcompile.Gelu(x) }}",
    "square": f"{SIGNATURE} <float two = {{2}}> {{ y = Pow(x, two) }}",
    "quotient": f"{SIGNATURE} <float c = {{3}}> {{ y = Div(x, c) }}",
    "rotary": f"({HEADS} x, int64[batch_size, sequence_length] position_ids) => ({HEADS} y) <{ANGLE_CONSTANTS}>"
    f" {{ {ANGLES} {rotary()} }}",
    "attention": attention(),
    "attention, mask off by one": attention({"mask": STEPS["mask"].replace("LessOrEqual", "Less")}),
    "attention, padding seen": attention({"mask": STEPS["mask"].replace("And(causal, token4)", "And(causal, causal)")}),
    "gate and up": gate_up(),
    "qkv": qkv(MATMULS),
}
WEIGHTS = {
    **dict.fromkeys(("gamma", "beta"), (8,)),
    "w": (8, 8),
    "f32_frequency": np.tile(np.array([1.0, 0.5, 0.25, 0.125], np.float32), 2),
    "wg": (6, 4),
    "wu": (6, 4),
    "wq": (6, 8),
    "wk": (6, 4),
    "wv": (6, 4),
}


def context_for(name: str, pass_class: type[Pass], seed: int = 0, dtype: str = "float") -> PassContext:
    text = GRAPHS[name]
    names = ("f32_frequency",) if name.startswith("attention") else WEIGHTS
    used = {key: WEIGHTS[key] for key in names if re.search(rf"\b{key}\b", text)}
    context = PassContext(read_graph(text, used, dtype), Prover(seed))
    for prepare in (*TIDY, FuseRotaryEmbedding) if pass_class is FuseAttention else ():
        prepare()(context)
    return context


# Each break is a rewrite of the rule that is wrong in one way.


def norm(epsilon: float | Callable[[float], float] = lambda e: e, gamma: Any = None) -> Callable[..., Any]:
    def rewrite(self: Any, op: Any, x: Any, gamma: Any, eps: Any, **_: Any) -> Any:
        return self.emit(op, x, gamma, epsilon=epsilon(scalar(eps)) if callable(epsilon) else epsilon)

    return rewrite


def epsilon_outside_the_root(self: Any, op: Any, x: Any, gamma: Any, eps: Any, **_: Any) -> Any:
    mean = op.ReduceMean(op.Mul(x, x), op.initializer(ir.tensor(np.array([-1])), name="last"))
    return op.Mul(op.Div(x, op.Add(op.Sqrt(mean), eps)), gamma)


def no_gamma(self: Any, op: Any, x: Any, gamma: Any, eps: Any, **_: Any) -> Any:
    return op.Div(self.emit(op, x, gamma, epsilon=scalar(eps)), gamma)


def not_centred(self: Any, op: Any, x: Any, gamma: Any, beta: Any, eps: Any, **_: Any) -> Any:
    return op.Add(op.RmsNorm(x, gamma, epsilon=scalar(eps), _domain=DOMAIN, _version=1), beta)


def beta_is_gamma(self: Any, op: Any, x: Any, gamma: Any, beta: Any, eps: Any, **_: Any) -> Any:
    return self.emit(op, x, gamma, gamma, epsilon=scalar(eps))


def sum_of_the_wrong_values(self: Any, op: Any, x: Any, residual: Any, gamma: Any, epsilon: Any, **_: Any) -> Any:
    return self.emit(op, x, x, gamma, epsilon=epsilon.as_float())


def outputs_swapped(self: Any, op: Any, x: Any, residual: Any, gamma: Any, epsilon: Any, **_: Any) -> Any:
    y, h = self.emit(op, x, residual, gamma, epsilon=epsilon.as_float())
    return h, y


def missing_bias(self: Any, op: Any, x: Any, weight: Any, bias: Any, **_: Any) -> Any:
    return op.MatMul(x, weight)


def transposed_weight(self: Any, op: Any, x: Any, weight: Any, bias: Any, **_: Any) -> Any:
    return self.emit(op, x, op.Transpose(weight, perm=[1, 0]), bias)


def weight_not_transposed(self: Any, op: Any, x: Any, weight: Any, bias: Any, **_: Any) -> Any:
    return op.Add(op.MatMul(x, weight), bias)


def gate_and_up_swapped(self: Any, op: Any, gate: Any, up: Any, **_: Any) -> Any:
    return self.emit(op, up, gate)


def tanh_for_erf(self: Any, op: Any, x: Any, **_: Any) -> Any:
    return op.GeluTanh(x, _domain=DOMAIN, _version=1)


def fast_gelu(self: Any, op: Any, x: Any, **_: Any) -> Any:
    return op.FastGelu(x, _domain="com.microsoft", _version=1)


def cube(self: Any, op: Any, x: Any, **_: Any) -> Any:
    return op.Mul(op.Mul(x, x), x)


def rounded_inverse(self: Any, op: Any, x: Any, c: Any, **_: Any) -> Any:
    return op.Mul(x, op.initializer(ir.tensor(np.array(0.333, np.float32)), name="inverse"))


def other_sign(self: Any, op: Any, x: Any, cos: Any, sin: Any, **_: Any) -> Any:
    return self.emit(op, x, cos, op.Neg(sin))


def cos_and_sin_swapped(self: Any, op: Any, x: Any, cos: Any, sin: Any, **_: Any) -> Any:
    return self.emit(op, x, sin, cos)


def interleaved(self: Any, op: Any, x: Any, cos: Any, sin: Any, **_: Any) -> Any:
    order = op.initializer(ir.tensor(np.array([0, 4, 1, 5, 2, 6, 3, 7])), name="order")
    return self.emit(op, op.Gather(x, order, axis=3), cos, sin)


def attend(**changes: Any) -> Callable[..., Any]:
    """The right rewrite with one binding changed."""

    def rewrite(self: Any, op: Any, **bindings: Any) -> Any:
        changed = dict(bindings)
        for name, change in changes.items():
            changed[name] = change(op, bindings)
        return right_attention(self, op, **changed)

    return rewrite


def wrong_scale(self: Any, op: Any, **bindings: Any) -> Any:
    y, key, value = right_attention(self, op, **bindings)
    y.producer().attributes["scale"] = ir.AttrFloat32("scale", 0.126)
    return y, key, value


right_attention = Attention.rewrite
REVERSED = np.array([3, 2, 1, 0])
heads_reversed = attend(q=lambda op, b: op.Gather(b["q"], op.initializer(ir.tensor(REVERSED), name="order"), axis=2))
past_swapped = attend(past_key=lambda op, b: b["past_value"], past_value=lambda op, b: b["past_key"])
keys_for_values = attend(v=lambda op, b: b["k"])

BROKEN: dict[str, tuple[str, type[Pass], type, Callable[..., Any]]] = {
    "epsilon ten times larger": ("rms norm", FuseRmsNorm, RmsNormChain, norm(lambda e: 10 * e)),
    "epsilon a tenth larger": ("rms norm", FuseRmsNorm, RmsNormChain, norm(lambda e: 1.1 * e)),
    "no epsilon": ("rms norm", FuseRmsNorm, RmsNormChain, norm(1e-30)),
    "epsilon outside the root": ("rms norm", FuseRmsNorm, RmsNormChain, epsilon_outside_the_root),
    "no gamma": ("rms norm", FuseRmsNorm, RmsNormChain, no_gamma),
    "layer norm not centred": ("layer norm", FuseLayerNorm, LayerNormChain, not_centred),
    "gamma for beta": ("layer norm", FuseLayerNorm, LayerNormChain, beta_is_gamma),
    "the residual is lost": ("sum and norm", FuseAddRmsNorm, AddRmsNorm, sum_of_the_wrong_values),
    "norm and sum swapped": ("sum and norm", FuseAddRmsNorm, AddRmsNorm, outputs_swapped),
    "missing bias": ("projection", FuseLinear, Linear, missing_bias),
    "transposed weight": ("projection", FuseLinear, Linear, transposed_weight),
    "weight not transposed": ("gemm", CanonicalizeProjections, GemmToMatMul, weight_not_transposed),
    "gate and up swapped": ("gate", FuseSwiGlu, SwiGlu, gate_and_up_swapped),
    "tanh for erf": ("gelu", FuseGelu, GeluErf, tanh_for_erf),
    "a kernel that is nearly right": ("fused gelu", LowerToOrt, LowerGelu, fast_gelu),
    "a cube for a square": ("square", CanonicalizeArithmetic, PowToMul, cube),
    "a rounded inverse": ("quotient", CanonicalizeArithmetic, DivByConstantToMul, rounded_inverse),
    "sign of the rotated half": ("rotary", FuseRotaryEmbedding, RotaryChain, other_sign),
    "cos and sin swapped": ("rotary", FuseRotaryEmbedding, RotaryChain, cos_and_sin_swapped),
    "interleaved pairs": ("rotary", FuseRotaryEmbedding, RotaryChain, interleaved),
    "scale off by a hundredth": ("attention", FuseAttention, Attention, wrong_scale),
    "heads in another order": ("attention", FuseAttention, Attention, heads_reversed),
    "past keys and values swapped": ("attention", FuseAttention, Attention, past_swapped),
    "keys for values": ("attention", FuseAttention, Attention, keys_for_values),
}


def require_rolled_back(context: PassContext, result: PassResult, before: bytes) -> None:
    assert result.rewrites == 0
    assert result.proved > 0
    assert model_bytes(context.model) == before
    assert len(result.rejected) == 1
    told = ROLLED_BACK.fullmatch(result.rejected[0].reason)
    assert told is not None, result.rejected[0].reason
    assert told["case"] in {case.name for case in context.analysis.cases}
    assert float(told["error"]) > LIMIT
    assert result.record()["rejected"][0]["reason"] == result.rejected[0].reason


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_rolled_back_with_its_error(name, monkeypatch):
    graph, pass_class, rule, rewrite = BROKEN[name]
    right = context_for(graph, pass_class)
    assert pass_class()(right).rewrites == 1
    monkeypatch.setattr(rule, "rewrite", rewrite)
    context = context_for(graph, pass_class)
    before = model_bytes(context.model)
    require_rolled_back(context, pass_class()(context), before)


@pytest.mark.parametrize("name", ["attention, mask off by one", "attention, padding seen"])
def test_a_mask_that_nobody_looked_at_is_seen_by_the_proof(name, monkeypatch):
    monkeypatch.setattr(fuse_attention, "require_causal", lambda rule, mask: None)
    context = context_for(name, FuseAttention)
    before = model_bytes(context.model)
    require_rolled_back(context, FuseAttention()(context), before)


@pytest.mark.parametrize(("name", "pass_class"), [("gate and up", FuseGateUp), ("qkv", FuseQkv)])
def test_projections_packed_in_the_wrong_order(name, pass_class, monkeypatch):
    context = context_for(name, pass_class)
    before = model_bytes(context.model)

    def swapped(tensors: Any) -> Any:
        return concat_columns([*tensors[:-2], tensors[-1], tensors[-2]])

    monkeypatch.setattr(pack, "concat_columns", swapped)
    require_rolled_back(context, pass_class()(context), before)


@pytest.mark.parametrize("broken", ["dtype", "shape"])
def test_another_type_or_shape_is_refused_before_anything_runs(broken, monkeypatch):
    def rewrite(self: Any, op: Any, gate: Any, up: Any, **_: Any) -> Any:
        y = self.emit(op, gate, up)
        return op.Cast(y, to=10) if broken == "dtype" else op.Transpose(y, perm=[1, 0, 2])

    monkeypatch.setattr(SwiGlu, "rewrite", rewrite)
    context = context_for("gate", FuseSwiGlu)
    before = model_bytes(context.model)
    result = FuseSwiGlu()(context)
    seen = "FLOAT16[1, 7, 8]" if broken == "dtype" else "FLOAT[7, 1, 8]"
    assert result.rejected[0].reason == f"rolled back: 'y' is FLOAT[1, 7, 8] before and {seen} after"
    assert model_bytes(context.model) == before


def test_fewer_bits_are_refused(monkeypatch):
    """The proof runs in float32, so a softmax that lost its Cast is told by its operators."""
    text = f"{SIGNATURE} {{ w = Cast<to = 1>(x) s = Softmax<axis = -1>(w) y = Cast<to = $T>(s) }}"
    context = PassContext(read_graph(text, {}, "float16"), Prover())
    before = model_bytes(context.model)

    def in_half(self: Any, op: Any, x: Any, **_: Any) -> Any:
        return op.Softmax(x, axis=-1)

    def pattern(self: Any, op: Any, x: Any) -> Any:
        return op.Cast(op.Softmax(op.Cast(x), axis=-1))

    monkeypatch.setattr(SwiGlu, "pattern", pattern)
    monkeypatch.setattr(SwiGlu, "require", lambda self, **_: None)
    monkeypatch.setattr(SwiGlu, "rewrite", in_half)
    result = FuseSwiGlu()(context)
    assert result.rejected[0].reason == "rolled back: Softmax would run in 16 bits instead of 32"
    assert model_bytes(context.model) == before


def test_a_subgraph_that_cannot_run_is_refused(monkeypatch):
    monkeypatch.setattr(
        SwiGlu, "rewrite", lambda self, op, gate, up, **_: op.Mul(gate, up, _domain="nowhere", _version=1)
    )
    context = context_for("gate", FuseSwiGlu)
    before = model_bytes(context.model)
    reason = FuseSwiGlu()(context).rejected[0].reason
    assert reason.startswith("rolled back: ONNX Runtime cannot load a subgraph: ")
    assert "\n" not in reason
    assert model_bytes(context.model) == before


def test_one_broken_place_does_not_stop_the_others(monkeypatch):
    """Of two gates the second is rewritten wrongly: the first stays fused, the second stays as it was."""
    text = (
        f"({SHAPE} a, {SHAPE} b) => ({SHAPE} y, {SHAPE} z) {{ s = Sigmoid(a) g = Mul(a, s) y = Mul(g, b) t = Sigmoid(b)"
    )
    context = PassContext(read_graph(f"{text} h = Mul(b, t) z = Mul(h, a) }}"), Prover())
    right = SwiGlu.rewrite

    def rewrite(self: Any, op: Any, gate: Any, up: Any, **_: Any) -> Any:
        return right(self, op, gate, up) if gate.name == "a" else gate_and_up_swapped(self, op, gate, up)

    monkeypatch.setattr(SwiGlu, "rewrite", rewrite)
    result = FuseSwiGlu()(context)
    assert (result.rewrites, len(result.rejected)) == (1, 1)
    assert expressions(context.model) == {"y": "qcompile::SwiGlu(a, b)", "z": "Mul(Mul(b, Sigmoid(b)), a)"}


def test_a_roll_back_is_in_the_report_and_strict_fails(tmp_path, monkeypatch):
    source = export_tiny(tmp_path)
    monkeypatch.setattr(AddRmsNorm, "rewrite", sum_of_the_wrong_values)
    report = optimize_tiny(source, tmp_path / "out", target="portable")
    result = next(r for r in report.results if r.name == "fuse-add-rms-norm")
    assert (result.rewrites, len(result.rejected)) == (0, 4)
    assert all(ROLLED_BACK.fullmatch(r.reason) for r in result.rejected)
    assert any("fuse-add-rms-norm" in w and "rolled back" in w for w in report.warnings)
    assert "qcompile::AddRmsNorm" not in {
        n.op_identifier()[:2] for n in load_model(tmp_path / "out" / "model.onnx").graph
    }
    assert compare_directories(source, tmp_path / "out").holds(quantized=False)


CORRECT = {
    "rms norm": FuseRmsNorm,
    "layer norm": FuseLayerNorm,
    "sum and norm": FuseAddRmsNorm,
    "projection": FuseLinear,
    "gate": FuseSwiGlu,
    "gelu": FuseGelu,
    "rotary": FuseRotaryEmbedding,
    "attention": FuseAttention,
    "qkv": FuseQkv,
    "gate and up": FuseGateUp,
}


@pytest.mark.parametrize("name", CORRECT)
def test_a_correct_rewrite_is_never_rejected(name):
    """Draws of the activations and of weights of many magnitudes, in three float types."""
    pass_class = CORRECT[name]
    for seed in range(16):
        context = context_for(name, pass_class, seed, ("float", "float16", "bfloat16")[seed % 3])
        rng = np.random.default_rng(seed)
        for value in context.model.graph.initializers.values():
            tensor = value.const_value
            if (
                tensor is not None
                and tensor.size > 4
                and tensor.dtype.is_floating_point()
                and value.name != "f32_frequency"
            ):
                array = rng.standard_normal(tensor.shape.numpy()) * 10.0 ** rng.integers(-3, 3)
                value.const_value = ir.tensor(array.astype(tensor.numpy().dtype), name=value.name)
        result = pass_class()(context)
        assert result.rejected == []
        assert result.rewrites == result.proved == 1
