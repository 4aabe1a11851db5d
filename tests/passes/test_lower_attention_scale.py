import numpy as np
import pytest

from qcompile.passes.lower_attention_scale_to_ort import LowerAttentionScaleToOrt
from tests.passes.graph_text import read_graph, relative_error, run_graph
from tests.passes.six_tests import Example, NearMiss, SixTests

ANGLES = np.arange(64, dtype=np.float32)[:, None] * (1e4 ** (-np.arange(8) / 8)).astype(np.float32)
TABLES = {"f32_cos": np.cos(ANGLES), "f32_sin": np.sin(ANGLES)}
CACHE = "float[batch_size, 1, max_sequence_length, 16]"
ROW = "float[batch_size, sequence_length, 16]"
INPUTS = f"float[batch_size, sequence_length, 32] q, {ROW} k, {ROW} v, int32[batch_size] seqlens_k, int32 total"


def kernel(scale, at=0):
    attributes = f"num_heads = 2, kv_num_heads = 1, do_rotary = 1, scale = {scale}"
    call = f"com.microsoft.GroupQueryAttention<{attributes}>"
    return (
        f"y{at}, key{at}, value{at} = {call}(q, k, v, past_key{at}, past_value{at}, seqlens_k, total, f32_cos, f32_sin)"
    )


def graph(*scales, more="", cache=CACHE):
    layers = range(len(scales))
    inputs = ", ".join(f"{cache} past_key{i}, {cache} past_value{i}" for i in layers)
    outputs = ", ".join(
        f"float[batch_size, sequence_length, 32] y{i}, {cache} key{i}, {cache} value{i}" for i in layers
    )
    calls = " ".join(kernel(scale, i) for i, scale in enumerate(scales))
    return f"({INPUTS}, {inputs}) => ({outputs}{', ' + cache + ' z' if more else ''}) {{ {calls} {more} }}"


def alone(scale):
    """The kernel without its cache outputs."""
    text = graph(scale).replace("y0, key0, value0 = com", "y0 = com")
    return text.replace(f"y0, {CACHE} key0, {CACHE} value0)", "y0)")


def example(name, *scales):
    return Example(name, graph(*scales), None, TABLES, rewrites=sum(s != 1.0 for s in scales), dtypes=("float",))


class TestLowerAttentionScale(SixTests):
    pass_class = LowerAttentionScaleToOrt
    examples = (
        example("heads of 16", 0.25),
        example("no power of two", 0.08838834764),
        example("two layers with a scale each, and one without", 0.25, 0.5, 1.0),
    )
    near_misses = (
        NearMiss("the keys are read elsewhere", graph(0.25, more="z = Neg(past_key0)"), "read elsewhere", TABLES),
        NearMiss("the new keys are read elsewhere", graph(0.25, more="z = Neg(key0)"), "read elsewhere", TABLES),
        NearMiss("the kernel's own scale", graph(0.0), "its scale is 0", TABLES),
        NearMiss("a negative scale", graph(-0.25), "its scale is -0.25", TABLES),
        NearMiss("a cache of half precision", graph(0.25, cache=CACHE.replace("float", "float16")), "FLOAT16", TABLES),
        NearMiss(
            "a cache of int8, which has scales of its own",
            graph(0.25, cache=CACHE.replace("float", "int8")),
            None,
            TABLES,
        ),
        NearMiss("tables unused", graph(0.25).replace("do_rotary = 1", "do_rotary = 0"), "does not rotate", TABLES),
        NearMiss("tables not asked for", graph(0.25).replace("do_rotary = 1, ", ""), "does not rotate", TABLES),
        NearMiss("no new keys", alone(0.25), "read elsewhere", TABLES),
        NearMiss("no attention", "(float[2] x) => (float[2] y) { y = Neg(x) }", None),
    )
    counts = (("qwen2-builder", 2), ("qwen3-builder", 2))

    @pytest.mark.parametrize(("length", "pasts"), [(4, (0,)), (1, (5, 0, 30)), (3, (6,))])
    @pytest.mark.parametrize("index", range(3))
    def test_numbers_agree(self, index, length, pasts):
        """Also step by step: what one step appends is what the next one reads."""
        example, rng = self.examples[index], np.random.default_rng(index)
        models = read_graph(example.before, example.weights), self.outcome(example, "float").context.model
        scales = [node.attributes["scale"].as_float() for node in models[0].graph]
        feeds = self.first_feeds(len(scales), len(pasts), rng)
        folded = feeds | {f"past_key{i}": feeds[f"past_key{i}"] * np.float32(np.sqrt(s)) for i, s in enumerate(scales)}
        for step in range(2):
            rows = {name: rng.standard_normal((len(pasts), length, 16)).astype(np.float32) for name in "kv"}
            rows["q"] = rng.standard_normal((len(pasts), length, 32)).astype(np.float32)
            rows["seqlens_k"] = np.array([p + (step + 1) * length - 1 for p in pasts], np.int32)
            rows["total"] = np.array(max(pasts) + (step + 1) * length, np.int32)
            seen = [run_graph(model, given | rows) for model, given in zip(models, (feeds, folded), strict=True)]
            for i, scale in enumerate(scales):
                (y, key, value), after = (outputs[3 * i : 3 * i + 3] for outputs in seen)
                wanted = y, key * np.float32(np.sqrt(scale)), value
                assert all(relative_error(a, b) < 1e-5 for a, b in zip(wanted, after, strict=True))
                for given, outputs in zip((feeds, folded), seen, strict=True):
                    given |= {f"past_key{i}": outputs[3 * i + 1], f"past_value{i}": outputs[3 * i + 2]}

    @staticmethod
    def first_feeds(layers, batch, rng):
        names = [f"past_{kind}{i}" for kind in ("key", "value") for i in range(layers)]
        return {name: rng.standard_normal((batch, 1, 48, 16)).astype(np.float32) for name in names}

    def test_the_kernel_multiplies_by_one(self):
        model = self.outcome(self.examples[2], "float").context.model
        assert [node.attributes["scale"].as_float() for node in model.graph] == [1.0, 1.0, 1.0]

    def test_a_folding_that_is_wrong_is_rolled_back(self, monkeypatch):
        monkeypatch.setattr("qcompile.passes.lower_attention_scale_to_ort.math.sqrt", lambda x: 1.01 * x**0.5)
        result = self.run(self.prepared(self.examples[0].before, TABLES, "float", 18))
        assert result.rewrites == 0
        assert "relative error" in result.rejected[0].reason
