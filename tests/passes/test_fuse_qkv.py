import numpy as np

from qcompile.passes.clean import EliminateIdentities
from qcompile.passes.fuse_qkv import FuseQkv
from tests.passes.heads import ANGLE_CONSTANTS
from tests.passes.six_tests import Example, NearMiss, SixTests

X = "float[batch_size, sequence_length, 6]"
PAST = "float[batch_size, 1, past_sequence_length, 4]"
PRESENT = "float[batch_size, 1, total_sequence_length, 4]"
ANGLE = "float[batch_size, 1, sequence_length, 4]"
Q, K = np.arange(48, dtype=np.float32).reshape(6, 8) / 48, np.arange(24, dtype=np.float32).reshape(6, 4) / 24
WEIGHTS = {"wq": Q, "wk": K, "wv": -K}
BIASES = {"bq": Q[0], "bk": K[1], "bv": K[2]}
MATMULS = {name: f"{name} = MatMul(x, w{name})" for name in "qkv"}
LINEARS = {name: f"{name} = qcompile.Linear(x, w{name}, b{name})" for name in "qkv"}


def graph(projections, operands="q, k, v", inputs="", outputs=""):
    nodes = " ".join(projections.values())
    call = f"qcompile.Attention<num_heads = 2, kv_num_heads = 1, scale = 0.5>({operands}, past_key, past_value, CACHE)"
    call = call.replace("CACHE", "cos, sin, attention_mask")
    return f"""({X} x, {PAST} past_key, {PAST} past_value, {ANGLE} cos, {ANGLE} sin,
        int64[batch_size, total_sequence_length] attention_mask{inputs}) =>
        (float[batch_size, sequence_length, 8] y, {PRESENT} present_key, {PRESENT} present_value{outputs})
        <{ANGLE_CONSTANTS}> {{
        {nodes} y, present_key, present_value = {call} }}"""


def packed(projection):
    rows = ", ".join(f"Split({projection}, split.8x4x4, axis=-1).{i}" for i in range(3))
    call = f"qcompile::Attention({rows.replace('split.8x4x4', '[8, 4, 4]')}, past_key, past_value, cos, sin, attention_mask"
    call += ", kv_num_heads=1, num_heads=2, scale=0.5)"
    return {name: f"{call}.{i}" for i, name in enumerate(("y", "present_key", "present_value"))}


class TestFuseQkv(SixTests):
    pass_class = FuseQkv
    examples = (
        Example("without bias", graph(MATMULS), packed("MatMul(x, qkv_proj.weight)"), WEIGHTS),
        Example(
            "with bias",
            graph(LINEARS),
            packed("qcompile::Linear(x, qkv_proj.weight, qkv_proj.bias)"),
            {**WEIGHTS, **BIASES},
        ),
        Example(
            "through Reshape and the norm of each head",
            graph(
                {
                    **MATMULS,
                    "n": "s = Reshape(q, heads) n = qcompile.RmsNorm<epsilon = 0.1>(s, gamma) f = Reshape(n, flat)",
                },
                "f, k, v",
            )
            .replace("-1, 8}", "-1, 4}")
            .replace("0, 0, 32", "0, 0, -1"),
            None,
            {**WEIGHTS, "gamma": Q[0, :4]},
        ),
        Example(
            "the input is read elsewhere",
            graph({**MATMULS, "z": "z = Neg(x)"}, outputs=f", {X} z"),
            {**packed("MatMul(x, qkv_proj.weight)"), "z": "Neg(x)"},
            WEIGHTS,
        ),
        Example(
            "the query is read elsewhere too",
            graph({**MATMULS, "z": "z = Neg(q)"}, outputs=", float[batch_size, sequence_length, 8] z"),
            {
                **packed("MatMul(x, qkv_proj.weight)"),
                "z": "Neg(Split(MatMul(x, qkv_proj.weight), [8, 4, 4], axis=-1).0)",
            },
            WEIGHTS,
        ),
    )
    near_misses = (
        NearMiss(
            "values of something else",
            graph({**MATMULS, "v": "a = Abs(x) v = MatMul(a, wv)"}),
            "projections of different values",
            WEIGHTS,
        ),
        NearMiss(
            "one has a bias",
            graph({**MATMULS, "q": LINEARS["q"]}),
            "some projections have a bias",
            {**WEIGHTS, **BIASES},
        ),
        NearMiss(
            "keys are not projected",
            graph({**MATMULS, "k": "k = Slice(x, zero, four, last)"}),
            "comes from Slice",
            WEIGHTS,
        ),
        NearMiss(
            "a shared weight", graph({**MATMULS, "v": "v = MatMul(x, wk)"}), "'wk' is used elsewhere too", WEIGHTS
        ),
        NearMiss(
            "a projection is an output",
            graph(MATMULS, outputs=", float[batch_size, sequence_length, 4] k"),
            "is an output of the graph",
            WEIGHTS,
        ),
        NearMiss(
            "the weight is an input",
            graph({**MATMULS, "k": "k = MatMul(x, outside)"}, inputs=", float[6, 4] outside"),
            "not from a projection by a weight",
            WEIGHTS,
        ),
        NearMiss("no attention", f"({X} x) => ({X} y) {{ y = Neg(x) }}", "there is no Attention"),
    )
    counts = (
        ("qwen2-builder", 2),
        ("qwen2-dynamo-sdpa", 2),
        ("qwen2-optimum", 2),
        ("qwen3-builder", 2),
        ("qwen3-optimum", 2),
    )


def test_the_packed_weight_has_the_columns_in_order():
    context = TestFuseQkv.outcome(TestFuseQkv.examples[1], "float").context
    tensors = {name: value.const_value.numpy() for name, value in context.model.graph.initializers.items()}
    np.testing.assert_array_equal(tensors["qkv_proj.weight"], np.concatenate([Q, K, -K], axis=1))
    np.testing.assert_array_equal(tensors["qkv_proj.bias"], np.concatenate([Q[0], K[1], K[2]]))
    assert EliminateIdentities()(context).rewrites == 0
