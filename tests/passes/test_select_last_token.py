import numpy as np

from qcompile.passes.select_last_token import SelectLastToken
from tests.passes.graph_text import draw_feeds, read_graph, relative_error, run_graph
from tests.passes.six_tests import CALLS, Example, NearMiss, SixTests

IDS, V = "int64[batch_size, sequence_length] input_ids", "float[batch_size, sequence_length, 6]"
GIVEN = f"({IDS}) => ({V} logits)"
WEIGHTS = {"table": (4, 8), "w": (8, 6), "b": (6,)}
SELECTED = "Unsqueeze(GatherND({}, Unsqueeze(last_token_index, [1]), batch_dims=1), [1])"


def graph(nodes, signature=GIVEN):
    return f"{signature} {{ h = Gather(table, input_ids) {nodes} }}"


def logits(hidden):
    return SELECTED.format(hidden)


class TestSelectLastToken(SixTests):
    pass_class = SelectLastToken
    keeps_interface = False
    examples = (
        Example(
            "projection",
            graph("logits = MatMul(h, w)"),
            {"logits": f"MatMul({logits('Gather(table, input_ids)')}, w)"},
            WEIGHTS,
        ),
        Example(
            "with a bias",
            graph("p = MatMul(h, w) logits = Add(p, b)"),
            {"logits": f"Add(MatMul({logits('Gather(table, input_ids)')}, w), b)"},
            WEIGHTS,
        ),
        Example(
            "fused",
            graph("logits = qcompile.Linear(h, w, b)"),
            {"logits": f"qcompile::Linear({logits('Gather(table, input_ids)')}, w, b)"},
            WEIGHTS,
        ),
        Example("cast to float32", graph("p = MatMul(h, w) logits = Cast<to = $T>(p)"), None, WEIGHTS),
        Example(
            "a norm before it",
            graph("n = qcompile.RmsNorm<epsilon = 0.5>(h, gamma) logits = MatMul(n, w)"),
            None,
            {**WEIGHTS, "gamma": (8,)},
        ),
    )
    near_misses = (
        NearMiss("no logits", graph("scores = MatMul(h, w)", f"({IDS}) => ({V} scores)"), None, WEIGHTS),
        NearMiss(
            "logits are mixed over rows",
            graph("p = MatMul(h, w) logits = Softmax<axis = 1>(p)"),
            "do not come from a projection",
            WEIGHTS,
        ),
        NearMiss(
            "logits are not projected",
            graph("logits = Neg(h)", f"({IDS}) => (float[batch_size, sequence_length, 8] logits)"),
            "do not come from a projection",
            WEIGHTS,
        ),
    )
    counts = (("qwen2-builder", 1), ("qwen2-dynamo-sdpa", 1), ("qwen2-optimum", 1), ("layernorm-gelu-legacy14", 0))

    def test_numbers_agree(self, example, dtype):
        original = read_graph(example.before, example.weights, dtype, example.opset)
        model = self.outcome(example, dtype).context.model
        for index, (batch, length, _) in enumerate(CALLS):
            feeds = draw_feeds(original, batch, length, seed=index)
            chosen = np.arange(batch) % length
            all_rows = run_graph(original, feeds)[0]
            one_row = run_graph(model, {**feeds, "last_token_index": chosen})[0]
            assert relative_error(all_rows[np.arange(batch), chosen][:, None], one_row) <= self.limits[dtype]
