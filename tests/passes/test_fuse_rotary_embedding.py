import numpy as np

from qcompile.passes.fuse_rotary_embedding import FuseRotaryEmbedding
from tests.passes.heads import ANGLE_CONSTANTS, ANGLES, COS, SIN, SPLIT, rotary
from tests.passes.six_tests import TIDY, Example, NearMiss, SixTests

HEADS = "float[batch_size, 3, sequence_length, 8]"
SIGNATURE = f"({HEADS} x, int64[batch_size, sequence_length] position_ids) => ({HEADS} y)"
WEIGHTS = {"f32_frequency": np.tile(np.array([1.0, 0.5, 0.25, 0.125], np.float32), 2)}
FUSED = {"y": f"qcompile::RotaryEmbedding(x, {COS}, {SIN})"}
NODE = "qcompile::RotaryEmbedding"


def graph(nodes, signature=SIGNATURE, angles=ANGLES):
    return f"{signature} <{ANGLE_CONSTANTS}> {{ {angles} {nodes} }}"


def operator(attributes="", cache="", angles="h = Slice(c, zero, four, a3) i = Slice(s, zero, four, a3)"):
    squeezed = "h3 = Squeeze(h, a1) i3 = Squeeze(i, a1) ch = Cast<to = $T>(h3) sh = Cast<to = $T>(i3)"
    return graph(f"{angles} {squeezed} y = RotaryEmbedding<{attributes}>(x, ch, sh{cache})")


class TestFuseRotaryEmbedding(SixTests):
    pass_class = FuseRotaryEmbedding
    prepare = TIDY
    examples = (
        Example("slices", graph(rotary()), FUSED, WEIGHTS, dtypes=("float",)),
        Example("slices in half", graph(rotary()), None, WEIGHTS, dtypes=("float16", "bfloat16")),
        Example("split", graph(rotary(cut=SPLIT)), FUSED, WEIGHTS, dtypes=("float",)),
        Example(
            "split by sizes",
            graph(rotary(cut="first, second = Split<axis = 3>({x}, halves)")),
            FUSED,
            WEIGHTS,
            dtypes=("float",),
        ),
        Example(
            "cos and sin first",
            graph(rotary(straight="Mul(cos, {x})", crossed="Mul(sin, rotated)")),
            FUSED,
            WEIGHTS,
            dtypes=("float",),
        ),
        Example("sum commuted", graph(rotary(total="Add(crossed, straight)")), FUSED, WEIGHTS, dtypes=("float",)),
        Example(
            "axis 3",
            graph(
                rotary(
                    rotated="Concat<axis = 3>(negative, first)",
                    cut="first = Slice({x}, zero, four, a3) second = Slice({x}, four, eight, a3)",
                )
            ),
            FUSED,
            WEIGHTS,
            dtypes=("float",),
        ),
        Example(
            "queries and keys share the angles",
            graph(
                rotary() + rotary("k", "z"),
                f"({HEADS} x, {HEADS} k, int64[batch_size, sequence_length] position_ids) => ({HEADS} y, {HEADS} z)",
            ),
            {**FUSED, "z": FUSED["y"].replace("(x", "(k")},
            WEIGHTS,
            rewrites=2,
            dtypes=("float",),
        ),
    )
    near_misses = (
        NearMiss("the sign of the first half", graph(rotary(negative="Identity(second)")), None, WEIGHTS),
        NearMiss(
            "halves swapped",
            graph(rotary(cut="second = Slice({x}, zero, four, last) first = Slice({x}, four, end, last)")),
            "the halves are cut at [4, ",
            WEIGHTS,
        ),
        NearMiss(
            "cut elsewhere",
            graph(rotary(cut="first, second = Split<axis = -1>({x}, uneven)")),
            "cut into [2, 6]",
            WEIGHTS,
        ),
        NearMiss(
            "angles per head",
            graph(rotary(), angles=ANGLES.replace("Cos(angle)", "Mul(angle, f32_per_head)")),
            "wanted [1 or 1, 1, 7, 8]",
            {**WEIGHTS, "f32_per_head": (1, 3, 1, 1)},
        ),
        NearMiss(
            "rotated half of another value",
            graph("x2 = Abs(x) " + rotary("x2").replace("Mul(x2, cos)", "Mul(x, cos)")),
            "not the same x",
            WEIGHTS,
        ),
        NearMiss(
            "the rotated half is read elsewhere",
            graph(rotary() + " z = Neg(y_rotated)", SIGNATURE.replace("y)", f"y, {HEADS} z)")),
            "also read by Neg",
            WEIGHTS,
        ),
        NearMiss(
            "the rotated half is an output",
            graph(rotary(), SIGNATURE.replace("y)", f"y, {HEADS} y_rotated)")),
            "also an output of the graph",
            WEIGHTS,
        ),
    )
    counts = (
        ("qwen2-builder", 4),
        ("qwen2-dynamo-sdpa", 4),
        ("qwen2-optimum", 4),
        ("qwen2-dynamo-opset23", 4),
        ("qwen3-builder", 4),
    )
