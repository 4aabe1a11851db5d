import numpy as np

from qcompile.passes.base import Pass
from qcompile.passes.lower_kv8_to_ort import LowerKv8ToOrt
from qcompile.passes.quantize_kv8 import KV8, CacheScales
from tests.passes.graph_text import read_graph, relative_error, run_graph
from tests.passes.six_tests import Example, NearMiss, SixTests

CACHE = "float[batch_size, 1, max_sequence_length, 16]"
ROW = "float[batch_size, sequence_length, 16]"
KERNEL = "com.microsoft.GroupQueryAttention<num_heads = 2, kv_num_heads = 1, do_rotary = 0, scale = 0.25>"
SCALES = np.random.default_rng(2).random((2, 1, 16)).astype(np.float32) / 20 + 0.01


def graph(key="past_key_values__0__key"):
    return f"""(float[batch_size, sequence_length, 32] q, {ROW} k, {ROW} v, {CACHE} {key},
        {CACHE} past_key_values__0__value, int32[batch_size] seqlens_k, int32 total)
        => (float[batch_size, sequence_length, 32] y, {CACHE} key, {CACHE} value)
        {{ y, key, value = {KERNEL}(q, k, v, {key}, past_key_values__0__value, seqlens_k, total) }}"""


class WithScales(Pass):
    """Stands for kv8, which needs calibration data."""

    name = "with-scales"

    def call(self, context, result):
        context.model.meta[KV8] = {0: CacheScales(*SCALES)}


class TestLowerKv8(SixTests):
    pass_class = LowerKv8ToOrt
    keeps_interface = False
    prepare = (WithScales,)
    examples = (Example("a cache with scales", graph(), None, dtypes=("float",)),)
    near_misses = (
        NearMiss("a cache of another name", graph("some_key"), "its cache is no graph input"),
        NearMiss("no attention", "(float[2] x) => (float[2] y) { y = Neg(x) }", None),
    )
    counts = (("qwen2-builder", 0),)

    def test_numbers_agree(self):
        rng = np.random.default_rng(0)
        codes = {kind: rng.integers(-127, 128, (1, 1, 12, 16)).astype(np.int8) for kind in ("key", "value")}
        feeds = {name: rng.standard_normal((1, 1, 16)).astype(np.float32) / 4 for name in "kv"}
        feeds["q"] = rng.standard_normal((1, 1, 32)).astype(np.float32)
        feeds |= {"seqlens_k": np.array([9], np.int32), "total": np.array(10, np.int32)}
        floats = {f"past_key_values.0.{k}": c * SCALES[i][:, None] for i, (k, c) in enumerate(codes.items())}
        wanted = run_graph(read_graph(graph()), feeds | floats)
        model = self.outcome(self.examples[0], "float").context.model
        seen = run_graph(model, feeds | {f"past_key_values.0.{k}": c for k, c in codes.items()})
        assert relative_error(wanted[0], seen[0]) < 2e-2
        for index, cache in enumerate(seen[1:]):
            assert cache.dtype == np.int8
            assert relative_error(wanted[1 + index][:, :, :10], cache[:, :, :10] * SCALES[index][:, None]) < 2e-2
