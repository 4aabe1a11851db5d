from qcompile.passes.normalize_opset import NormalizeOpset
from tests.passes.norms import SHAPE, SIGNATURE
from tests.passes.six_tests import EXACT, Example, NearMiss, SixTests


def example(name, nodes, y, opset, **options):
    return Example(name, f"{SIGNATURE} {{ {nodes} }}", y and {"y": y}, opset=opset, **options)


class TestNormalizeOpset(SixTests):
    pass_class = NormalizeOpset
    limits = EXACT
    examples = (
        example("mean", "m = ReduceMean<axes = [-1]>(x) y = Sub(x, m)", "Sub(x, ReduceMean(x, [-1]))", 17),
        example(
            "squeeze",
            "u = Unsqueeze<axes = [0]>(x) n = Neg(u) y = Squeeze<axes = [0]>(n)",
            "Squeeze(Neg(Unsqueeze(x, [0])), [0])",
            12,
            dtypes=("float",),
        ),
        example(
            "split by sizes",
            "a, b = Split<axis = 2, split = [3, 5]>(x) y = Concat<axis = 2>(b, a)",
            None,
            11,
            dtypes=("float",),
        ),
        example("split evenly", "a, b = Split<axis = 2>(x) y = Concat<axis = 2>(b, a)", None, 13, dtypes=("float",)),
        example("softmax over the last axis", "y = Softmax<axis = 2>(x)", "Softmax(x, axis=-1)", 12, dtypes=("float",)),
        example(
            "softmax over two axes",
            "y = Softmax(x)",
            "Reshape(Softmax(Flatten(x, axis=1), axis=-1), Shape(x))",
            11,
            dtypes=("float",),
        ),
        example("dropout", "n = Neg(x) d = Dropout<ratio = 0.5>(n) y = Exp(d)", None, 11, dtypes=("float",)),
        example("nothing to convert", "y = Neg(x)", "Neg(x)", 14),
    )
    near_misses = (
        NearMiss("opset 18 already", f"{SIGNATURE} {{ y = Neg(x) }}", None),
        NearMiss("a later opset", f"{SIGNATURE} {{ y = Neg(x) }}", None, opset=21),
        NearMiss("too old", f"{SIGNATURE} {{ y = Neg(x) }}", "opsets before 11 are not converted", opset=10),
        NearMiss(
            "outputs that are gone",
            "(float[batch_size, 8, 2] x) => (float[batch_size, 8, 2] y) "
            "{ y, m, v, sm, sv = BatchNormalization(x, a, a, a, a) }",
            "training outputs have gone; the graph stays at opset 11",
            {"a": (8,)},
            opset=11,
        ),
    )
    counts = (("qwen2-optimum", 0), ("layernorm-gelu-legacy14", 1))


def test_the_model_says_opset_18():
    context = TestNormalizeOpset.outcome(TestNormalizeOpset.examples[0], "float").context
    assert context.model.graph.opset_imports[""] == 18
    assert SHAPE in SIGNATURE
