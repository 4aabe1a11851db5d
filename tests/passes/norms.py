"""Norms as exporters spell them, for the tests of the norm fusions."""

SHAPE = "float[batch_size, sequence_length, 8]"
SIGNATURE = f"({SHAPE} x) => ({SHAPE} y)"
ADDED = f"({SHAPE} x, {SHAPE} residual) => ({SHAPE} y, {SHAPE} h)"
CONSTANTS = """<float eps = {7.62939453125e-06}, float[1] eps_1d = {7.62939453125e-06}, float two = {2},
    float one = {1}, float minus_half = {-0.5}, int64[1] last = {-1}, int64[1] second = {1}, int64[1] third = {2}>"""
# The three spellings of x / sqrt(variance), commuted too.
NORMALS = {
    "reciprocal": "r = Sqrt(variance) i = Reciprocal(r) n = Mul(x, i)",
    "reciprocal first": "r = Sqrt(variance) i = Reciprocal(r) n = Mul(i, x)",
    "one over root": "r = Sqrt(variance) i = Div(one, r) n = Mul(x, i)",
    "div by root": "r = Sqrt(variance) n = Div(x, r)",
    "power -1/2": "i = Pow(variance, minus_half) n = Mul(i, x)",
}


def rms_norm(
    square: str = "Mul(x, x)",
    mean: str = "ReduceMean<keepdims = 1>(square, last)",
    variance: str = "Add(mean, eps)",
    normal: str = NORMALS["reciprocal"],
    scaled: str = "Mul(n, gamma)",
    signature: str = SIGNATURE,
    before: str = "",
    after: str = "",
) -> str:
    """The chain of an RMS norm of x, with some of its steps replaced."""
    steps = f"square = {square} mean = {mean} variance = {variance} {normal} y = {scaled}"
    return f"{signature} {CONSTANTS} {{ {before} {steps} {after} }}"


def layer_norm(
    mean: str = "ReduceMean<keepdims = 1>(x, last)",
    square: str = "Mul(c, c)",
    spread: str = "ReduceMean<keepdims = 1>(square, last)",
    variance: str = "Add(spread, eps)",
    normal: str = NORMALS["reciprocal"],
    scaled: str = "Mul(n, gamma)",
    shifted: str = "Add(s, beta)",
    signature: str = SIGNATURE,
    before: str = "",
    after: str = "",
) -> str:
    """The chain of a layer norm of x, with some of its steps replaced."""
    steps = f"mean = {mean} c = Sub(x, mean) square = {square} spread = {spread} variance = {variance}"
    normal = (
        normal.replace("Mul(x, i)", "Mul(c, i)").replace("Mul(i, x)", "Mul(i, c)").replace("Div(x, r)", "Div(c, r)")
    )
    return f"{signature} {CONSTANTS} {{ {before} {steps} {normal} s = {scaled} y = {shifted} {after} }}"
