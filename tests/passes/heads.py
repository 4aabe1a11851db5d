"""Rotary embeddings and attention as exporters spell them, for the tests of their fusions."""

from collections.abc import Mapping

ANGLES = """p = Cast<to = 1>(position_ids) p4 = Unsqueeze(p, axes13) angle = Mul(p4, f32_frequency)
    c = Cos(angle) s = Sin(angle) cos = Cast<to = $T>(c) sin = Cast<to = $T>(s)"""
ANGLE_CONSTANTS = """int64[2] axes13 = {1, 3}, int64[2] axes12 = {1, 2}, int64[1] a0 = {0}, int64[1] a1 = {1},
    int64[1] a2 = {2}, int64[1] a3 = {3}, int64[1] last = {-1}, int64[1] zero = {0}, int64[1] four = {4},
    int64[1] eight = {8}, int64[1] end = {9223372036854775807}, int64 i0 = {0}, int64 i1 = {1}, float none = {0},
    float low = {-60000}, float scale = {0.125}, float root = {0.5}, float off = {0.25}, int64[3] flat = {0, 0, 32},
    int64[5] wide = {1, 1, 2, 1, 1}, int64[4] joined = {0, 4, -1, 8}, int64[4] heads = {0, 0, -1, 8},
    int64[2] halves = {4, 4}, int64[2] uneven = {2, 6}, int64[5] turned = {1, 2, 1, 1, 1}"""
# cos and sin as the passes leave them in a float32 graph.
COS, SIN = (f"{curve}(Mul(Unsqueeze(Cast(position_ids, to=1), [1, 3]), f32_frequency))" for curve in ("Cos", "Sin"))

SLICES = "first = Slice({x}, zero, four, last) second = Slice({x}, four, end, last)"
SPLIT = "first, second = Split<axis = -1, num_outputs = 2>({x})"


def rotary(
    x: str = "x",
    y: str = "y",
    cut: str = SLICES,
    negative: str = "Neg(second)",
    rotated: str = "Concat<axis = -1>(negative, first)",
    straight: str = "Mul({x}, cos)",
    crossed: str = "Mul(rotated, sin)",
    total: str = "Add(straight, crossed)",
) -> str:
    """The nodes of y = x * cos + rotate_half(x) * sin; names inside carry the name of y."""
    text = f"{cut} negative = {negative} rotated = {rotated} straight = {straight} crossed = {crossed} {y} = {total}"
    text = text.replace("{x}", x)
    for name in ("first", "second", "negative", "rotated", "straight", "crossed"):
        text = text.replace(name, f"{y}_{name}")
    return text


MASK = """total = Shape<start = 1, end = 2>(attention_mask) query = Shape<start = 1, end = 2>(q)
    total0 = Squeeze(total, a0) query0 = Squeeze(query, a0) past0 = Sub(total0, query0)
    columns = Range(i0, total0, i1) rows = Range(past0, total0, i1) rows2 = Unsqueeze(rows, a1)
    causal = LessOrEqual(columns, rows2) token = Cast<to = 9>(attention_mask) token4 = Unsqueeze(token, axes12)
    visible = And(causal, token4)"""
REPEAT_KEYS = "gk = Unsqueeze(present_key, a2) wk = Expand(gk, wide) keys = Reshape(wk, joined)"
REPEAT_VALUES = "gv = Unsqueeze(present_value, a2) wv = Expand(gv, wide) values = Reshape(wv, joined)"
STEPS: dict[str, str] = {
    "mask": f"{MASK} bias = Where(visible, none, low)",
    "q": "qt = Transpose<perm = [0, 2, 1, 3]>(q)",
    "k": "kt = Transpose<perm = [0, 2, 1, 3]>(k)",
    "v": "vt = Transpose<perm = [0, 2, 1, 3]>(v)",
    "q_rope": rotary("qt", "qr"),
    "k_rope": rotary("kt", "kr"),
    "present_key": "present_key = Concat<axis = 2>(past_key, kr)",
    "present_value": "present_value = Concat<axis = 2>(past_value, vt)",
    "keys": REPEAT_KEYS,
    "values": REPEAT_VALUES,
    "transposed": "ktt = Transpose<perm = [0, 1, 3, 2]>(keys)",
    "scores": "product = MatMul(qr, ktt) scores = Mul(product, scale)",
    "masked": "masked = Add(scores, bias)",
    "softmax": "w32 = Softmax<axis = -1>(masked) weights = Identity(w32)",
    "mixed": "mixed = MatMul(weights, values)",
    "y": "yt = Transpose<perm = [0, 2, 1, 3]>(mixed) y = Reshape(yt, flat)",
}


def attention(changes: Mapping[str, str] | None = None, inputs: str = "", outputs: str = "", heads: int = 4) -> str:
    """Attention of 4 query and 2 key heads of 8 dimensions with a cache, with some of its steps replaced."""
    unknown = set(changes or {}) - set(STEPS)
    assert not unknown, unknown
    steps = "\n".join({**STEPS, **(changes or {})}.values())
    return f"""(float[batch_size, sequence_length, {heads}, 8] q, float[batch_size, sequence_length, 2, 8] k,
        float[batch_size, sequence_length, 2, 8] v, float[batch_size, 2, past_sequence_length, 8] past_key,
        float[batch_size, 2, past_sequence_length, 8] past_value, int64[batch_size, total_sequence_length] attention_mask,
        int64[batch_size, sequence_length] position_ids{inputs}) =>
        (float[batch_size, sequence_length, {heads * 8}] y, float[batch_size, 2, total_sequence_length, 8] present_key,
        float[batch_size, 2, total_sequence_length, 8] present_value{outputs})
        <{ANGLE_CONSTANTS}> {{ {ANGLES} {steps} }}"""
