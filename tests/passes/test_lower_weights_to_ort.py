from qcompile.passes.lower_weights_to_ort import LowerWeightsToOrt
from tests.passes.norms import SHAPE
from tests.passes.six_tests import Example, NearMiss, SixTests

OUT = "float[batch_size, sequence_length, 16]"
TABLE = {"table": (16, 8)}
TIED = "t = Transpose<perm = [1, 0]>(table) logits = MatMul(x, t)"
LEADING = "Concat(Shape(x, end=2, start=0), [16], axis=0)"


class TestLowerWeightsToOrt(SixTests):
    pass_class = LowerWeightsToOrt
    examples = (
        Example(
            "a tied head",
            f"({SHAPE} x) => ({OUT} logits) {{ {TIED} }}",
            {"logits": f"Reshape(Gemm(Reshape(x, [-1, 8]), table, transB=1), {LEADING})"},
            TABLE,
        ),
        Example(
            "the table is an embedding too",
            f"({SHAPE} x, int64[batch_size, sequence_length] input_ids) => ({OUT} logits, {SHAPE} e)"
            f" {{ {TIED} e = Gather(table, input_ids) }}",
            {
                "logits": f"Reshape(Gemm(Reshape(x, [-1, 8]), table, transB=1), {LEADING})",
                "e": "Gather(table, input_ids)",
            },
            TABLE,
        ),
    )
    near_misses = (
        NearMiss(
            "a weight of its own", f"({SHAPE} x) => ({OUT} logits) {{ logits = MatMul(x, w) }}", None, {"w": (8, 16)}
        ),
        NearMiss(
            "an activation transposed",
            "(float[4, 8] x, float[16, 8] z) => (float[4, 16] y) { t = Transpose(z) y = MatMul(x, t) }",
            None,
        ),
        NearMiss("a vector", "(float[8] x) => (float[16] logits) { " + TIED + " }", None, TABLE),
    )
    counts = (("qwen2-builder", 0),)
