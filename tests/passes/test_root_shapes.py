from qcompile.passes.root_shapes import RootShapes
from tests.passes.six_tests import EXACT, Example, NearMiss, SixTests

IDS, MASK = "int64[batch_size, sequence_length] input_ids", "int64[batch_size, total_sequence_length] attention_mask"
X = "float[batch_size, sequence_length, 8] x"


def graph(nodes, inputs=IDS, output="int64[n] y"):
    return f"({inputs}, {X}) => ({output}) <int64[1] one = {{1}}, int64 zero = {{0}}> {{ {nodes} }}"


def shape(name, axis):
    return f"Shape({name}, end={axis + 1}, start={axis})"


B, S = shape("input_ids", 0), shape("input_ids", 1)


class TestRootShapes(SixTests):
    pass_class = RootShapes
    limits = EXACT
    examples = (
        Example(
            "all dims",
            graph("h = Neg(x) s = Shape(h) y = Add(s, one)"),
            {"y": f"Add(Concat({B}, {S}, [8], axis=0), [1])"},
        ),
        Example(
            "a part",
            graph("h = Neg(x) s = Shape<start = 1, end = 2>(h) y = Add(s, one)"),
            {"y": f"Add(Concat({S}, axis=0), [1])"},
        ),
        Example(
            "from the end",
            graph("h = Neg(x) s = Shape<start = -2>(h) y = Add(s, one)"),
            {"y": f"Add(Concat({S}, [8], axis=0), [1])"},
        ),
        Example(
            "the length of the cache",
            graph(
                "h = Concat<axis = 1>(past, x) s = Shape<start = 1, end = 2>(h) y = Add(s, one)",
                f"{IDS}, float[batch_size, past_sequence_length, 8] past, {MASK}",
            ),
            {"y": f"Add(Concat({shape('attention_mask', 1)}, axis=0), [1])"},
        ),
        Example(
            "two readers",
            graph("h = Neg(x) s = Shape(h) t = Shape<start = 0, end = 1>(h) y = Add(s, t)"),
            None,
            rewrites=2,
        ),
    )
    near_misses = (
        NearMiss("of an input", graph("s = Shape(x) y = Add(s, one)"), None),
        NearMiss("the shape is an output", graph("h = Neg(x) y = Shape(h)"), None),
        NearMiss(
            "no input has this dim",
            graph("h = Concat<axis = 1>(x, x) s = Shape<start = 1, end = 2>(h) y = Add(s, one)"),
            None,
        ),
        NearMiss("it hangs on what is in the data", graph("h = NonZero(x) s = Shape(h) y = Add(s, one)"), None),
    )
    counts = (("qwen2-builder", 0), ("qwen2-dynamo-sdpa", 3), ("qwen2-optimum", 12))
