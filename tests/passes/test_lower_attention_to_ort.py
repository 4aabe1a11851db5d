import numpy as np
import pytest

from qcompile.passes.fuse_attention import FuseAttention
from qcompile.passes.fuse_rotary_embedding import FuseRotaryEmbedding
from qcompile.passes.lower_attention_to_ort import LowerAttentionToOrt
from qcompile.passes.proof import Prover
from tests.passes.graph_text import read_graph, relative_error, run_graph
from tests.passes.heads import ANGLES, STEPS, attention
from tests.passes.six_tests import TIDY, Example, NearMiss, SixTests

SMALL_WEIGHTS = {"f32_frequency": np.tile(0.5 ** np.arange(4, dtype=np.float32), 2)}
WEIGHTS = {"f32_frequency": np.tile(0.5 ** np.arange(8, dtype=np.float32), 2)}
ROWS = ", ".join(f"Reshape({name}, [0, 0, -1])" for name in "qkv")


def named(text):
    return text.replace("past_key", "past_key_values__0__key").replace("past_value", "past_key_values__0__value")


def wider(text):
    """Heads of 16 dimensions, not 8."""
    changes = {
        ", 8]": ", 16]",
        "-1, 8}": "-1, 16}",
        "0, 0, 32}": "0, 0, 64}",
        ", 32] y": ", 64] y",
        "four = {4}": "four = {8}",
    }
    for old, new in changes.items():
        text = text.replace(old, new)
    return text


SMALL = named(attention())
GRAPH = wider(SMALL)
BY_STEP = ANGLES.replace("p4 = Unsqueeze(p, axes13)", "m = ReduceMax(p) pm = Div(p, m) p4 = Unsqueeze(pm, axes13)")


class TestLowerAttentionToOrt(SixTests):
    pass_class = LowerAttentionToOrt
    keeps_interface = False
    prepare = (*TIDY, FuseRotaryEmbedding, FuseAttention)
    examples = (
        Example("rotary inside", GRAPH, None, WEIGHTS, dtypes=("float",)),
        Example("rotary outside: dynamic NTK", GRAPH.replace(ANGLES, BY_STEP), None, WEIGHTS, dtypes=("float",)),
        Example("rotary outside: small heads", SMALL, None, SMALL_WEIGHTS, dtypes=("float",)),
    )
    near_misses = (
        NearMiss("no attention", "(float[2] x) => (float[2] y) { y = Neg(x) }", None),
        NearMiss(
            "the cache is read by something else",
            named(
                attention(
                    {"y": STEPS["y"] + " z = Neg(past_key)"},
                    outputs=", float[batch_size, 2, past_sequence_length, 8] z",
                )
            ),
            "some KV cache tensors are not read by a fused Attention",
            SMALL_WEIGHTS,
        ),
    )
    counts = (("qwen2-builder", 2), ("qwen2-optimum", 2), ("qwen3-builder", 2))

    @pytest.mark.parametrize(("lengths", "pasts"), [(4, (0,)), (1, (5, 0, 3)), (2, (6,))])
    def test_numbers_agree(self, lengths, pasts):
        """Rows of different lengths in one shared buffer, against each row alone with a cache of its exact length."""
        for example, head in ((self.examples[0], 16), (self.examples[2], 8)):
            original = read_graph(example.before, example.weights)
            model = self.outcome(example, "float").context.model
            rng = np.random.default_rng(sum(pasts))
            batch, size = len(pasts), max(pasts) + lengths + 2
            q, k, v = (rng.standard_normal((batch, lengths, h, head)).astype(np.float32) for h in (4, 2, 2))
            key, value = (rng.standard_normal((batch, 2, size, head)).astype(np.float32) for _ in range(2))
            feeds = {"q": q, "k": k, "v": v, "past_key_values.0.key": key, "past_key_values.0.value": value}
            feeds["seqlens_k"] = np.array([p + lengths - 1 for p in pasts], np.int32)
            feeds["position_ids"] = np.array(pasts)[:, None] + np.arange(lengths)
            feeds["total_sequence_length"] = np.array(max(pasts) + lengths, np.int32)
            y, present_key, present_value = run_graph(model, feeds)
            for row, past in enumerate(pasts):
                alone = {"q": q, "k": k, "v": v}
                alone = {name: array[row : row + 1] for name, array in alone.items()}
                alone["past_key_values.0.key"] = key[row : row + 1, :, :past]
                alone["past_key_values.0.value"] = value[row : row + 1, :, :past]
                alone["attention_mask"] = np.ones((1, past + lengths), np.int64)
                alone["position_ids"] = np.arange(past, past + lengths)[None]
                wanted = run_graph(original, alone)
                seen = [
                    y[row : row + 1],
                    *(c[row : row + 1, :, : past + lengths] for c in (present_key, present_value)),
                ]
                assert all(relative_error(a, b) < 1e-5 for a, b in zip(wanted, seen, strict=True))


def test_the_interface_is_that_of_a_shared_buffer():
    model = TestLowerAttentionToOrt.outcome(TestLowerAttentionToOrt.examples[0], "float").context.model
    names = [v.name for v in model.graph.inputs]
    assert names == [
        "q",
        "k",
        "v",
        "seqlens_k",
        "total_sequence_length",
        "past_key_values.0.key",
        "past_key_values.0.value",
    ]
    caches = [v for v in model.graph.inputs if v.name.startswith("past_key_values.")]
    assert all(str(v.shape[2]) == "max_sequence_length" for v in caches)
    assert {f"{n.domain}::{n.op_type}" for n in model.graph} >= {"com.microsoft::GroupQueryAttention"}


def test_angles_that_hang_on_the_whole_step_stay_outside():
    outcome = TestLowerAttentionToOrt.outcome(TestLowerAttentionToOrt.examples[1], "float")
    assert "(dynamic NTK scaling)" in outcome.result.detail["rotary"]
    assert "position_ids" in [v.name for v in outcome.context.model.graph.inputs]


def test_small_heads_are_rotated_outside_the_kernel():
    outcome = TestLowerAttentionToOrt.outcome(TestLowerAttentionToOrt.examples[2], "float")
    assert outcome.result.detail["rotary"] == "outside the kernel: it rotates heads of multiples of 16, these have 8"
    kernel = next(n for n in outcome.context.model.graph if n.op_type == "GroupQueryAttention")
    assert kernel.attributes["do_rotary"].as_int() == 0


def test_without_a_prover_nothing_is_proved():
    context = TestLowerAttentionToOrt.prepared(GRAPH, WEIGHTS, "float", 18)
    context.prover = None
    assert LowerAttentionToOrt()(context).proved == 0
    context = TestLowerAttentionToOrt.prepared(GRAPH, WEIGHTS, "float", 18)
    context.prover = Prover(limit=1e-12)
    result = LowerAttentionToOrt()(context)
    assert result.rewrites == 0
    assert result.rejected[0].reason.startswith("rolled back: 5 tokens after [0]: relative error")
