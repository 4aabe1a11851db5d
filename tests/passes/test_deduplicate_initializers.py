import numpy as np
import onnx_ir as ir

from qcompile.passes.deduplicate_initializers import DeduplicateInitializers
from tests.passes.norms import SHAPE, SIGNATURE
from tests.passes.six_tests import EXACT, Example, NearMiss, SixTests

ONES = {"a": np.ones(8, np.float32), "b": np.ones(8, np.float32)}
LARGE = np.zeros(600 * 600, np.float32)


class TestDeduplicateInitializers(SixTests):
    pass_class = DeduplicateInitializers
    limits = EXACT
    examples = (
        Example("equal vectors", f"{SIGNATURE} {{ c = Mul(x, a) y = Add(c, b) }}", {"y": "Add(Mul(x, a), a)"}, ONES),
        Example(
            "equal scalars",
            f"{SIGNATURE} <float c = {{2}}, float d = {{2}}, int64 e = {{2}}> {{ m = Mul(x, c) y = Add(m, d) }}",
            {"y": "Add(Mul(x, 2), 2)"},
        ),
        Example(
            "three of them",
            f"{SIGNATURE} {{ d = Mul(x, a) e = Add(d, b) y = Sub(e, c) }}",
            {"y": "Sub(Add(Mul(x, a), a), a)"},
            {**ONES, "c": np.ones(8, np.float32)},
            rewrites=2,
        ),
        Example(
            "large ones",
            "(float[360000] x) => (float[360000] y) { c = Mul(x, a) y = Add(c, b) }",
            {"y": "Add(Mul(x, a), a)"},
            {"a": LARGE, "b": LARGE},
        ),
    )
    near_misses = (
        NearMiss(
            "large ones that differ in one place",
            "(float[360000] x) => (float[360000] y) { c = Mul(x, a) y = Add(c, b) }",
            None,
            {"a": LARGE, "b": np.where(np.arange(360000) == 359000, 1, LARGE).astype(np.float32)},
        ),
        NearMiss(
            "another shape",
            f"{SIGNATURE} {{ c = Mul(x, a) y = Add(c, b) }}",
            None,
            {"a": ONES["a"], "b": np.ones((1, 8), np.float32)},
        ),
        NearMiss(
            "another bit",
            f"{SIGNATURE} {{ c = Mul(x, a) y = Add(c, b) }}",
            None,
            {"a": np.zeros(8, np.float32), "b": -np.zeros(8, np.float32)},
        ),
        NearMiss(
            "another type",
            f"{SIGNATURE} {{ f = Cast<to = 1>(b) c = Mul(x, a) y = Add(c, f) }}",
            None,
            {"a": np.zeros(8, np.float32), "b": np.zeros(8, np.int32)},
        ),
        NearMiss(
            "an output by name",
            f"({SHAPE} x) => ({SHAPE} y, float[8] a, float[8] b) {{ c = Mul(x, a) y = Add(c, b) }}",
            None,
            ONES,
        ),
    )
    counts = (("qwen2-builder", 2), ("qwen2-optimum", 185))  # one of each is axes [-1], written by two lowerings


def test_large_weights_are_compared_by_where_they_lie(tmp_path):
    weights = ir.Model(
        ir.Graph(
            [],
            [],
            nodes=[],
            initializers=[
                ir.Value(
                    name=n,
                    const_value=ir.tensor(LARGE, name=n),
                    type=ir.TensorType(ir.DataType.FLOAT),
                    shape=ir.Shape([360000]),
                )
                for n in "ab"
            ],
            opset_imports={"": 18},
            name="g",
        ),
        ir_version=10,
    )
    ir.save(weights, tmp_path / "m.onnx", external_data="m.data")
    context = TestDeduplicateInitializers.prepared(
        "(float[360000] x) => (float[360000] y) { c = Mul(x, a) d = Mul(x, b) y = Add(c, d) }",
        {"a": LARGE, "b": LARGE},
        "float",
        18,
    )
    saved = ir.load(tmp_path / "m.onnx").graph.initializers
    graph = context.model.graph
    for name in "ab":
        graph.initializers[name].const_value = saved["a"].const_value
    assert DeduplicateInitializers()(context).rewrites == 1
    for name, where in (("a", saved["a"]), ("b", saved["b"])):
        if name in graph.initializers:
            graph.initializers[name].const_value = where.const_value
