from qcompile.passes.fuse_swiglu import FuseSwiGlu
from tests.passes.norms import SHAPE
from tests.passes.six_tests import TIDY, Example, NearMiss, SixTests

SIGNATURE = f"({SHAPE} gate, {SHAPE} up) => ({SHAPE} y)"
FUSED = {"y": "qcompile::SwiGlu(gate, up)"}
ONE = "<float one = {1}>"


class TestFuseSwiGlu(SixTests):
    pass_class = FuseSwiGlu
    prepare = TIDY
    examples = (
        Example("silu times up", f"{SIGNATURE} {{ s = Sigmoid(gate) g = Mul(gate, s) y = Mul(g, up) }}", FUSED),
        Example(
            "up times silu, commuted", f"{SIGNATURE} {{ s = Sigmoid(gate) g = Mul(s, gate) y = Mul(up, g) }}", FUSED
        ),
        Example("gate last", f"{SIGNATURE} {{ s = Sigmoid(gate) g = Mul(up, s) y = Mul(gate, g) }}", FUSED),
        Example(
            "logistic",
            f"{SIGNATURE} {ONE} {{ n = Neg(gate) e = Exp(n) a = Add(e, one) g = Div(gate, a) y = Mul(g, up) }}",
            FUSED,
        ),
        Example(
            "one over logistic",
            f"{SIGNATURE} {ONE} {{ n = Neg(gate) e = Exp(n) a = Add(one, e) s = Div(one, a)"
            " g = Mul(gate, s) y = Mul(g, up) }",
            FUSED,
        ),
        Example(
            "Swish of opset 24",
            f"{SIGNATURE} {{ g = Swish<alpha = 1.0>(gate) y = Mul(g, up) }}",
            FUSED,
            opset=24,
            dtypes=("bfloat16",),
        ),
        Example(
            "shared gate",
            f"({SHAPE} gate, {SHAPE} up) => ({SHAPE} y, {SHAPE} z)"
            " { s = Sigmoid(gate) g = Mul(gate, s) y = Mul(g, up) z = Neg(gate) }",
            {**FUSED, "z": "Neg(gate)"},
        ),
    )
    near_misses = (
        NearMiss(
            "sigmoid of another value",
            f"{SIGNATURE} {{ a = Abs(gate) s = Sigmoid(a) g = Mul(gate, s) y = Mul(g, up) }}",
            "not the same gate",
        ),
        NearMiss(
            "up is broadcast",
            f"({SHAPE} gate, float[batch_size, sequence_length, 1] up) => ({SHAPE} y)"
            " { s = Sigmoid(gate) g = Mul(gate, s) y = Mul(g, up) }",
            "one is broadcast",
        ),
        NearMiss("silu alone", f"({SHAPE} gate) => ({SHAPE} g) {{ s = Sigmoid(gate) g = Mul(gate, s) }}", None),
        NearMiss(
            "silu is an output",
            f"({SHAPE} gate, {SHAPE} up) => ({SHAPE} y, {SHAPE} g)"
            " { s = Sigmoid(gate) g = Mul(gate, s) y = Mul(g, up) }",
            "also an output of the graph",
        ),
        NearMiss(
            "the sigmoid is read elsewhere",
            f"({SHAPE} gate, {SHAPE} up) => ({SHAPE} y, {SHAPE} z)"
            " { s = Sigmoid(gate) g = Mul(gate, s) y = Mul(g, up) z = Neg(s) }",
            "also read by Neg",
        ),
        NearMiss("tanh gate", f"{SIGNATURE} {{ s = Tanh(gate) g = Mul(gate, s) y = Mul(g, up) }}", None),
    )
    counts = (
        ("qwen2-builder", 2),
        ("qwen2-dynamo-sdpa", 2),
        ("qwen2-optimum", 2),
        ("qwen3-builder", 2),
    )
