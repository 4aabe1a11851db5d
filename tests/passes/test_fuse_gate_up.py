import numpy as np

from qcompile.passes.fuse_gate_up import FuseGateUp
from tests.passes.six_tests import Example, NearMiss, SixTests

X, F = "float[batch_size, sequence_length, 6]", "float[batch_size, sequence_length, 4]"
WEIGHTS = {"wg": (6, 4), "wu": (6, 4)}
BIASES = {"bg": (4,), "bu": (4,)}


def graph(gate="MatMul(x, wg)", up="MatMul(x, wu)", extra="", inputs="", outputs=""):
    return f"({X} x{inputs}) => ({F} y{outputs}) {{ gate = {gate} up = {up} y = qcompile.SwiGlu(gate, up) {extra} }}"


def packed(projection):
    return {"y": f"qcompile::SwiGlu(Split({projection}, [4, 4], axis=-1).0, Split({projection}, [4, 4], axis=-1).1)"}


class TestFuseGateUp(SixTests):
    pass_class = FuseGateUp
    examples = (
        Example("without bias", graph(), packed("MatMul(x, gate_up_proj.weight)"), WEIGHTS),
        Example(
            "with bias",
            graph("qcompile.Linear(x, wg, bg)", "qcompile.Linear(x, wu, bu)"),
            packed("qcompile::Linear(x, gate_up_proj.weight, gate_up_proj.bias)"),
            {**WEIGHTS, **BIASES},
        ),
        Example(
            "the gate is read elsewhere too",
            graph(extra="z = Neg(gate)", outputs=f", {F} z"),
            {
                **packed("MatMul(x, gate_up_proj.weight)"),
                "z": "Neg(Split(MatMul(x, gate_up_proj.weight), [4, 4], axis=-1).0)",
            },
            WEIGHTS,
        ),
        Example(
            "two of them",
            graph(extra="g2 = MatMul(x, wg2) u2 = MatMul(x, wu2) z = qcompile.SwiGlu(g2, u2)", outputs=f", {F} z"),
            None,
            {**WEIGHTS, "wg2": (6, 4), "wu2": (6, 4)},
            rewrites=2,
        ),
    )
    near_misses = (
        NearMiss(
            "projections of different values",
            graph(up="MatMul(other, wu)", inputs=f", {X} other"),
            "of different values",
            WEIGHTS,
        ),
        NearMiss(
            "up is not projected",
            graph(up="Neg(other)", inputs=f", {F} other"),
            "does not come from a projection",
            WEIGHTS,
        ),
        NearMiss(
            "one has a bias",
            graph(up="qcompile.Linear(x, wu, bu)"),
            "some projections have a bias",
            {**WEIGHTS, **BIASES},
        ),
        NearMiss("one weight for both", graph(up="MatMul(x, wg)"), "'wg' is used elsewhere too", WEIGHTS),
        NearMiss("the gate is an output", graph(outputs=f", {F} gate"), "is an output of the graph", WEIGHTS),
        NearMiss("no SwiGlu", f"({X} x) => ({F} y) {{ y = MatMul(x, wg) }}", "there is no SwiGlu", WEIGHTS),
    )
    counts = (("qwen2-builder", 2), ("qwen2-dynamo-sdpa", 2), ("qwen2-optimum", 2), ("qwen3-builder", 2))


def test_the_gate_comes_first():
    context = TestFuseGateUp.outcome(TestFuseGateUp.examples[0], "float").context
    before = TestFuseGateUp.prepared(graph(), WEIGHTS, "float", 18).model.graph.initializers
    packed_weight = context.model.graph.initializers["gate_up_proj.weight"].const_value.numpy()
    wanted = np.concatenate([before[name].const_value.numpy() for name in ("wg", "wu")], axis=1)
    np.testing.assert_array_equal(packed_weight, wanted)
