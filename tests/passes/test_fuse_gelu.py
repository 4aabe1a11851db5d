from qcompile.passes.fuse_gelu import FuseGelu
from tests.passes.norms import SHAPE, SIGNATURE
from tests.passes.six_tests import TIDY, Example, NearMiss, SixTests

CONSTANTS = """<float root = {1.4142135}, float inverse = {0.70710678}, float one = {1}, float half = {0.5}, float two = {2},
    float three = {3}, float bend = {0.044715}, float slope = {0.7978845608}, float off = {0.72}>"""
ERF, TANH = {"y": "qcompile::Gelu(x)"}, {"y": "qcompile::GeluTanh(x)"}


def erf(
    argument="Div(x, root)",
    factor="Add(e, one)",
    product="h = Mul(x, half) y = Mul(h, f)",
    after="",
    signature=SIGNATURE,
):
    return f"{signature} {CONSTANTS} {{ a = {argument} e = Erf(a) f = {factor} {product} {after} }}"


def tanh(
    cube="Pow(x, three)",
    inner="b = Mul(bend, c) i = Add(x, b)",
    argument="Mul(i, slope)",
    factor="Add(one, t)",
    product="h = Mul(half, x) y = Mul(h, f)",
):
    return f"{SIGNATURE} {CONSTANTS} {{ c = {cube} {inner} a = {argument} t = Tanh(a) f = {factor} {product} }}"


class TestFuseGelu(SixTests):
    pass_class = FuseGelu
    prepare = TIDY
    examples = (
        Example("torch", erf(product="p = Mul(x, f) y = Mul(p, half)"), ERF),
        Example("half at x", erf(), ERF),
        Example("half first, commuted", erf(factor="Add(one, e)", product="h = Mul(half, x) y = Mul(f, h)"), ERF),
        Example("half at the factor", erf(product="g = Mul(half, f) y = Mul(g, x)"), ERF),
        Example("product first", erf(product="p = Mul(f, x) y = Mul(half, p)"), ERF),
        Example("divided by two", erf(product="p = Mul(x, f) y = Div(p, two)"), ERF),
        Example("times the inverse root", erf(argument="Mul(inverse, x)"), ERF),
        Example("operator", f"{SIGNATURE} {{ y = Gelu(x) }}", ERF, opset=20),
        Example("operator, exact by name", f'{SIGNATURE} {{ y = Gelu<approximate = "none">(x) }}', ERF, opset=20),
        Example("operator, tanh", f'{SIGNATURE} {{ y = Gelu<approximate = "tanh">(x) }}', TANH, opset=20),
        Example("tanh, power", tanh(), TANH),
        Example("tanh, products", tanh(cube="Mul(x, x)", inner="d = Mul(c, x) b = Mul(d, bend) i = Add(b, x)"), TANH),
        Example(
            "tanh, x times a factor",
            tanh(cube="Mul(x, x)", inner="b = Mul(c, bend) g = Add(one, b) i = Mul(x, g)"),
            TANH,
        ),
        Example("tanh, half last", tanh(product="p = Mul(x, f) y = Mul(half, p)"), TANH),
        Example("tanh, half at the factor", tanh(product="g = Mul(f, half) y = Mul(x, g)"), TANH),
    )
    near_misses = (
        NearMiss("another root", erf(argument="Mul(x, off)"), "factor of erf's argument is 0.72"),
        NearMiss("two added", erf(factor="Add(e, two)"), "what is added to erf is 2"),
        NearMiss("not halved", erf(product="h = Mul(x, two) y = Mul(h, f)"), "factor of x is 2"),
        NearMiss("erf of another value", erf(product="z = Abs(x) h = Mul(z, half) y = Mul(h, f)"), "not the same x"),
        NearMiss(
            "erf is an output", erf(signature=SIGNATURE.replace("y)", f"y, {SHAPE} e)")), "also an output of the graph"
        ),
        NearMiss(
            "erf is read elsewhere",
            erf(signature=SIGNATURE.replace("y)", f"y, {SHAPE} z)"), after="z = Neg(f)"),
            "also read by Neg",
        ),
        NearMiss("another bend", tanh(inner="b = Mul(half, c) i = Add(x, b)"), "factor of x^3 is 0.5"),
        NearMiss("another slope", tanh(argument="Mul(i, off)"), "factor of tanh's argument is 0.72"),
        NearMiss("a square, not a cube", tanh(cube="Mul(x, x)"), "wanted Mul"),
        NearMiss("the operator's attribute says otherwise", f"{SIGNATURE} {{ y = Sigmoid(x) }}", None, opset=20),
    )
    counts = (
        ("qwen2-builder", 0),
        ("layernorm-gelu-dynamo18", 4),
        ("layernorm-gelu-dynamo20", 4),
        ("layernorm-gelu-legacy14", 4),
    )
