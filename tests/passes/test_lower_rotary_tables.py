import numpy as np
import pytest

from qcompile.passes.lower_rotary_tables_to_ort import LowerRotaryTablesToOrt
from tests.passes.graph_text import read_graph, relative_error, run_graph
from tests.passes.six_tests import Example, NearMiss, SixTests

ANGLES = np.arange(1100, dtype=np.float32)[:, None] * (1e4 ** (-np.arange(8) / 8)).astype(np.float32)
TABLES = {"f32_cos": np.cos(ANGLES), "f32_sin": np.sin(ANGLES)}
CACHE = "float[batch_size, 1, max_sequence_length, 16]"
ROW = "float[batch_size, sequence_length, 16]"
INPUTS = f"""float[batch_size, sequence_length, 32] q, {ROW} k, {ROW} v, {CACHE} past_key, {CACHE} past_value,
    int32[batch_size] seqlens_k, int32 total"""
KERNEL = "com.microsoft.GroupQueryAttention<num_heads = 2, kv_num_heads = 1, do_rotary = 1, scale = 0.25>"


def graph(tables="f32_cos, f32_sin", more=""):
    outputs = f"float[batch_size, sequence_length, 32] y, {CACHE} key, {CACHE} value{', ' + ROW + ' z' if more else ''}"
    call = f"y, key, value = {KERNEL}(q, k, v, past_key, past_value, seqlens_k, total, {tables})"
    return f"({INPUTS}) => ({outputs}) {{ {call} {more} }}"


def example(name, text, weights):
    return Example(name, text, None, weights, dtypes=("float",))


def miss(name, reason, cos=TABLES["f32_cos"], sin=TABLES["f32_sin"]):
    return NearMiss(name, graph(), reason, {"f32_cos": cos, "f32_sin": sin})


class TestLowerRotaryTables(SixTests):
    pass_class = LowerRotaryTablesToOrt
    examples = (
        example("tables of positions times frequencies", graph(), TABLES),
        example("scaled tables, as YaRN has them", graph(), {k: v * np.float32(1.25) for k, v in TABLES.items()}),
        example(
            "a table that is read elsewhere too",
            graph(more="r = Gather(f32_cos, seqlens_k) s = Shape(r) z = Neg(k)"),
            TABLES,
        ),
    )
    near_misses = (
        miss("a short table", "a table of 100 positions", *(table[:100] for table in TABLES.values())),
        miss(
            "one angle is another",
            "not positions times frequencies",
            np.where(ANGLES == 700, 0, TABLES["f32_cos"]).astype(np.float32),
        ),
        miss("cos and sin swapped", "not positions times frequencies", TABLES["f32_sin"], TABLES["f32_cos"]),
        NearMiss("no attention", "(float[2] x) => (float[2] y) { y = Neg(x) }", None),
    )
    counts = (("qwen2-builder", 1), ("qwen3-builder", 1))

    @pytest.mark.parametrize("index", range(3))
    def test_numbers_agree(self, index):
        example, rng = self.examples[index], np.random.default_rng(index)
        feeds = {"seqlens_k": np.array([900], np.int32), "total": np.array(901, np.int32)}
        for name, shape in {
            "q": (1, 1, 32),
            "k": (1, 1, 16),
            "v": (1, 1, 16),
            "past_key": (1, 1, 950, 16),
            "past_value": (1, 1, 950, 16),
        }.items():
            feeds[name] = rng.standard_normal(shape).astype(np.float32)
        before = run_graph(read_graph(example.before, example.weights), feeds)
        after = run_graph(self.outcome(example, "float").context.model, feeds)
        assert all(relative_error(a, b) < 1e-5 for a, b in zip(before, after, strict=True))
