import numpy as np

from qcompile.passes.fuse_attention import FuseAttention
from qcompile.passes.fuse_rotary_embedding import FuseRotaryEmbedding
from tests.passes.heads import COS, MASK, SIN, STEPS, attention
from tests.passes.six_tests import TIDY, Example, NearMiss, SixTests

WEIGHTS = {"f32_frequency": np.tile(np.array([1.0, 0.5, 0.25, 0.125], np.float32), 2)}
ROWS = ", ".join(f"Reshape({name}, [0, 0, -1])" for name in "qkv")


def fused(scale="0.125", heads=4):
    call = f"qcompile::Attention({ROWS}, past_key, past_value, {COS}, {SIN}, attention_mask"
    call += f", kv_num_heads=2, num_heads={heads}, scale={scale})"
    return {"y": f"{call}.0", "present_key": f"{call}.1", "present_value": f"{call}.2"}


def example(name, changes=None, scale="0.125", **options):
    return Example(name, attention(changes), fused(scale), WEIGHTS, dtypes=("float",), **options)


def miss(name, changes, reason, inputs="", outputs=""):
    return NearMiss(name, attention(changes, inputs, outputs), reason, WEIGHTS)


NO_REPEAT = {"keys": "keys = Identity(present_key)", "values": "values = Identity(present_value)", "y": STEPS["y"]}
IN_FLOAT32 = {
    "mask": f"{MASK} bias = Where(visible, f32_none, f32_low)",
    "masked": "s32 = Cast<to = 1>(scores) masked = Add(s32, bias)",
    "softmax": "w32 = Softmax<axis = -1>(masked) weights = Cast<to = $T>(w32)",
}
WINDOW = (
    f"{MASK.replace('visible', 'plain')} edge = Sub(rows2, u7) near = Greater(columns, edge) visible = And(plain, near)"
)


OPERATOR = {
    "transposed": "",
    "scores": "",
    "masked": "",
    "softmax": "",
    "mixed": "mixed = Attention<ATTRIBUTES>(qr, keys, values, bias)",
}
WITH_CACHE = {
    **OPERATOR,
    "present_key": "",
    "present_value": "",
    "keys": "",
    "values": "",
    "mixed": "mixed, present_key, present_value = Attention<scale = 0.125>(qr, kr, vt, bias, past_key, past_value)",
}


def operator(attributes):
    return attention({**OPERATOR, "mixed": OPERATOR["mixed"].replace("ATTRIBUTES", attributes)})


class TestFuseAttention(SixTests):
    pass_class = FuseAttention
    prepare = (*TIDY, FuseRotaryEmbedding)
    examples = (
        Example("operator", operator("scale = 0.125"), fused(), WEIGHTS, opset=23, dtypes=("float",)),
        Example(
            "operator, default scale", operator("is_causal = 0"), fused("0.35355"), WEIGHTS, opset=23, dtypes=("float",)
        ),
        Example("operator with the cache", attention(WITH_CACHE), fused(), WEIGHTS, opset=23, dtypes=("float",)),
        example("repeated by Expand, mask added"),
        example(
            "repeated by Tile",
            {
                "keys": STEPS["keys"].replace("Expand(gk, wide)", "Tile(gk, wide)"),
                "values": STEPS["values"].replace("Expand(gv, wide)", "Tile(gv, wide)"),
            },
        ),
        example("mask selected by Where", {"mask": MASK, "masked": "masked = Where(visible, scores, low)"}),
        example("scale at the query", {"scores": "qs = Mul(qr, scale) scores = MatMul(qs, ktt)"}),
        example("scale at both", {"scores": "qs = Mul(qr, root) ks = Mul(ktt, off) scores = MatMul(qs, ks)"}),
        example("scale divides", {"scores": "product = MatMul(qr, ktt) scores = Div(product, off)"}, "4"),
        example("no scale", {"scores": "scores = MatMul(qr, ktt)"}, "1"),
        example("mask first", {"masked": "masked = Add(bias, scores)"}),
        example("NaN replaced", {"softmax": "w = Softmax<axis = 3>(masked) n = IsNaN(w) weights = Where(n, none, w)"}),
        example("softmax on the default axis", {"softmax": "weights = Softmax(masked)"}),
        Example(
            "softmax in float32 in a half graph",
            attention(IN_FLOAT32).replace("float none", "float f32_none = {0}, float f32_low = {-3e38}, float none"),
            None,
            WEIGHTS,
            dtypes=("float16", "bfloat16"),
        ),
        Example(
            "as many key heads as heads",
            attention(NO_REPEAT, heads=2).replace("0, 0, 32", "0, 0, 16"),
            fused(heads=2),
            WEIGHTS,
            dtypes=("float",),
        ),
        Example(
            "int32 mask",
            attention().replace("int64[batch_size, total_sequence_length]", "int32[batch_size, total_sequence_length]"),
            {k: v.replace("attention_mask", "Cast(attention_mask, to=7)") for k, v in fused().items()},
            WEIGHTS,
            dtypes=("float",),
        ),
        Example(
            "the cache is read elsewhere",
            attention(
                {"y": STEPS["y"] + " z = Neg(present_key)"},
                outputs=", float[batch_size, 2, total_sequence_length, 8] z",
            ),
            {**fused(), "z": f"Neg({fused()['present_key']})"},
            WEIGHTS,
            dtypes=("float",),
        ),
    )
    near_misses = (
        miss(
            "kv heads tiled in another order",
            {
                name: STEPS[name].replace("Expand(g", "Tile(g").replace(", wide)", ", turned)")
                for name in ("keys", "values")
            },
            "wanted 2 at axis 2",
        ),
        NearMiss("operator with a softcap", operator("softcap = 2.0"), "its softcap is 2.0", WEIGHTS, opset=23),
        NearMiss("causal operator", operator("is_causal = 1"), "its is_causal is 1", WEIGHTS, opset=23),
        miss(
            "mask off by one",
            {"mask": STEPS["mask"].replace("LessOrEqual", "Less")},
            "it hides the key 0 positions back",
        ),
        miss(
            "queries see the future",
            {"mask": STEPS["mask"].replace("LessOrEqual(columns, rows2)", "LessOrEqual(columns, total0)")},
            "queries see later tokens",
        ),
        miss(
            "padding is seen",
            {"mask": f"{MASK.replace('And(causal, token4)', 'And(causal, causal)')} bias = Where(visible, none, low)"},
            "queries see padding",
        ),
        NearMiss(
            "sliding window",
            attention({"mask": f"{WINDOW} bias = Where(visible, none, low)"}).replace(
                "int64 i1 =", "int64 u7 = {7}, int64 i1 ="
            ),
            "as a sliding window does",
            WEIGHTS,
        ),
        miss("position bias", {"mask": f"{MASK} bias = Where(visible, off, low)"}, "as position biases do"),
        miss(
            "hidden keys are not hidden",
            {"mask": f"{MASK} bias = Where(visible, none, off)"},
            "is not just causal and padding",
        ),
        miss(
            "a mask from outside",
            {"masked": "masked = Add(scores, outside)"},
            "does not hang on attention_mask",
            inputs=", float[batch_size, 1, sequence_length, total_sequence_length] outside",
        ),
        miss(
            "no cache",
            {
                "present_key": "present_key = Concat<axis = 2>(past_key, kr) other = Identity(kr)",
                "keys": STEPS["keys"].replace("present_key", "kr"),
            },
            None,
        ),
        miss(
            "cache and new keys swapped",
            {"present_key": "present_key = Concat<axis = 2>(kr, past_key)"},
            "RotaryEmbedding",
        ),
        miss("keys are not rotated", {"k_rope": "kr = Identity(kt)"}, "wanted RotaryEmbedding"),
        miss("softmax over queries", {"softmax": "weights = Softmax<axis = 2>(masked)"}, None),
        miss(
            "softmax is read elsewhere",
            {"y": STEPS["y"] + " z = Neg(weights)"},
            "also read by Neg",
            outputs=", float[batch_size, 4, sequence_length, total_sequence_length] z",
        ),
        miss(
            "scores are an output",
            {},
            "also an output of the graph",
            outputs=", float[batch_size, 4, sequence_length, total_sequence_length] scores",
        ),
        miss(
            "scale is computed",
            {"scores": "product = MatMul(qr, ktt) many = Abs(product) scores = Mul(product, many)"},
            None,
        ),
        miss(
            "NaN becomes 1",
            {"softmax": "w = Softmax(masked) n = IsNaN(w) weights = Where(n, scale, w)"},
            "NaN is not replaced by 0",
        ),
        miss(
            "scores of hidden keys", {"mask": MASK, "masked": "masked = Where(visible, scores, off)"}, "not low enough"
        ),
    )
    counts = (
        ("qwen2-builder", 2),
        ("qwen2-dynamo-sdpa", 2),
        ("qwen2-dynamo-eager", 2),
        ("qwen2-optimum", 2),
        ("qwen2-dynamo-opset23", 2),
        ("qwen3-builder", 2),
        ("qwen3-optimum", 2),
    )
