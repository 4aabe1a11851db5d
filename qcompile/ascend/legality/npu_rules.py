"""Rules about CANN's own operators: chips, types, attributes, then norms, rotary embedding and attention one by one."""

from __future__ import annotations

from collections.abc import Iterator

from qcompile.ascend.legality.finding import Finding
from qcompile.ascend.legality.rule import WRONG, Context, NodeRule, about, shape_text
from qcompile.ascend.legality.view import Node, Shape
from qcompile.ascend.operators import AttributeRule, Operator

_EPSILON = 1e-6
_MAX_ROTARY_HEAD = 896
# What the parsers of these operators read; the two norms have a rule of their own for epsilon.
_READS_ONLY = {
    "NPURotaryMul": frozenset[str](),
    "NPUDynamicQuant": frozenset[str](),
    "NPUDynamicQuantV2": frozenset[str](),
    "NPURmsNorm": frozenset({"epsilon", "eps"}),
    "NPUAddRmsNorm": frozenset({"epsilon", "eps"}),
    "NPUWeightQuantBatchMatmulV2": frozenset({"antiquant_group_size", "dtype"}),
}
# Values that say what happens anyway.
_HARMLESS: dict[str, tuple[object, ...]] = {
    "mode": (0, "half"),
    "rotary_mode": (0, "half"),
    "transpose_x": (0,),
    "transpose_weight": (0,),
    "dst_type": (2,),
}


def _detailed(context: Context, node: Node) -> Operator | None:
    operator = context.table.get(node.op)
    known = operator is not None and operator.is_detailed
    return operator if known and node.proto.domain in {"", "ai.onnx", "npu"} else None


def usable(context: Context, node: Node) -> Iterator[Finding]:
    """The chip has a kernel, and the parser passes on what the kernel needs."""
    operator = _detailed(context, node)
    if operator is None:
        return
    if operator.avoid:
        yield about(
            node,
            "op-unusable",
            "",
            effect=WRONG,
            certain=False,
            seen=f"{node.op}, which is parsed incompletely",
            wanted="an operator whose parser passes everything on",
            cure=operator.avoid,
        )
    if not operator.floats_on(context.chip):
        chips = ", ".join(operator.floats or ())
        yield about(
            node,
            "op-not-on-chip",
            "EZ3002",
            seen=f"{node.op} for {context.chip.name}",
            wanted=f"a chip with a kernel: {chips}",
            cure="write it in standard operators for this chip",
        )


def operands(context: Context, node: Node) -> Iterator[Finding]:
    """Inputs by count and type, outputs by count."""
    operator = _detailed(context, node)
    if operator is None or operator.avoid or not operator.floats_on(context.chip):
        return
    given = len(node.inputs)
    present = [i for i, port in enumerate(operator.inputs) if not port.is_optional]
    holes = [operator.inputs[i].name for i in present if node.input(i) is None]
    if holes or given > len(operator.inputs):
        yield about(
            node,
            "operand-count",
            "E11010",
            seen=f"{given} inputs, without {', '.join(holes)}" if holes else f"{given} inputs",
            wanted=f"{operator.min_inputs} to {len(operator.inputs)}: {', '.join(p.name for p in operator.inputs)}",
            cure="connect what is missing",
        )
        return
    needed = sum(not port.is_optional for port in operator.outputs)
    if not needed <= len(node.outputs) <= len(operator.outputs):
        yield about(
            node,
            "output-count",
            "E11010",
            seen=f"{len(node.outputs)} outputs",
            wanted=", ".join(port.name for port in operator.outputs),
            cure="declare all of them, even those nothing reads",
        )
    yield from _operand_types(context, node, operator)


def _operand_types(context: Context, node: Node, operator: Operator) -> Iterator[Finding]:
    floats = operator.floats_on(context.chip)
    shared = {}
    for port, value in zip(operator.inputs, node.inputs, strict=False):
        if value is None or value.dtype is None:
            continue
        if not port.takes(value.dtype, floats):
            taken = floats if port.is_float else port.dtypes
            yield _dtype_finding(context, node, f"{value.dtype} for {port.name}", ", ".join(sorted(taken)))
            return
        if port.is_float:
            shared[port.name] = value.dtype
    if len(set(shared.values())) > 1:
        seen = ", ".join(f"{name} {dtype}" for name, dtype in shared.items())
        yield _dtype_finding(context, node, seen, "one type for all of them")
    found = tuple(value.dtype for value in node.inputs if value is not None)
    if operator.combinations and None not in found and found not in operator.combinations:
        wanted = "; ".join(sorted(" ".join(c) for c in operator.combinations))
        yield _dtype_finding(context, node, " ".join(str(d) for d in found), wanted)


def _dtype_finding(context: Context, node: Node, seen: str, wanted: str) -> Finding:
    return about(
        node,
        "operand-dtype",
        "EZ3002",
        seen=seen,
        wanted=f"{wanted} on {context.chip.name}",
        cure="cast, or write it in standard operators",
    )


def attributes(context: Context, node: Node) -> Iterator[Finding]:
    """Attributes that must be there, and values that are taken."""
    operator = _detailed(context, node)
    if operator is None:
        return
    given = node.attributes
    for rule in operator.attributes:
        if rule.name not in given:
            if rule.required:
                yield _attribute_finding(node, f"no attribute {rule.name}", f"{rule.kind} {rule.name}")
            continue
        value = given[rule.name]
        if not _takes(rule, value):
            yield _attribute_finding(node, f"{rule.name} {value!r}", _wanted(rule))


def _takes(rule: AttributeRule, value: object) -> bool:
    kinds: dict[str, type | tuple[type, ...]] = {"int": int, "float": (float, int), "string": str}
    if not isinstance(value, kinds[rule.kind]) or (rule.allowed and value not in rule.allowed):
        return False
    if isinstance(value, int) and rule.minimum is not None and value < rule.minimum:
        return False
    return not (isinstance(value, int) and rule.maximum is not None and value > rule.maximum)


def _wanted(rule: AttributeRule) -> str:
    if rule.allowed:
        return f"{rule.kind} {rule.name} out of {', '.join(str(v) for v in rule.allowed)}"
    bounds = [f"at least {rule.minimum}"] if rule.minimum is not None else []
    bounds += [f"at most {rule.maximum}"] if rule.maximum is not None else []
    return f"{rule.kind} {rule.name} {' and '.join(bounds)}".strip()


def _attribute_finding(node: Node, seen: str, wanted: str) -> Finding:
    return about(node, "attribute", "E11010", seen=seen, wanted=wanted, cure="correct the attribute")


def rms_norm(context: Context, node: Node) -> Iterator[Finding]:
    """NPURmsNorm and NPUAddRmsNorm: the parser reads no attribute, epsilon is 1e-6."""
    if node.op not in {"NPURmsNorm", "NPUAddRmsNorm"}:
        return
    epsilon = node.attributes.get("epsilon", node.attributes.get("eps"))
    if isinstance(epsilon, float) and abs(epsilon - _EPSILON) > 1e-9:
        yield about(
            node,
            "rms-norm-epsilon",
            "",
            effect=WRONG,
            seen=f"epsilon {epsilon:g}",
            wanted="1e-06: the parser reads no attribute and the kernel uses this one",
            cure="write the norm in standard operators for this epsilon",
        )
    gamma, x = node.input(len(node.inputs) - 1), node.input(0)
    normed, scale = (x.shape if x else None, gamma.shape if gamma else None)
    if normed and scale and normed[-1] is not None and normed[-len(scale) :] != scale:
        yield about(
            node,
            "rms-norm-gamma",
            "E14001",
            seen=f"gamma {shape_text(scale)} for x {shape_text(normed)}",
            wanted="gamma as the last dimensions of x",
            cure="correct the weight's shape",
        )


def rotary(context: Context, node: Node) -> Iterator[Finding]:
    """NPURotaryMul and NPURotaryPositionEmbedding: even head size below 896, tables that broadcast, a limit in BNSD."""
    if node.op not in {"NPURotaryMul", "NPURotaryPositionEmbedding"}:
        return
    x, cos, sin = (value.shape if value else None for value in (node.input(0), node.input(1), node.input(2)))
    if x is None or cos is None or len(x) != 4:
        return
    head = x[3]
    if head is not None and (head % 2 or head >= _MAX_ROTARY_HEAD):
        yield _rotary_finding(node, f"head size {head}", "an even number below 896", "use Mul, Concat and Neg")
    if sin is not None and sin != cos:
        yield _rotary_finding(
            node, f"cos {shape_text(cos)}, sin {shape_text(sin)}", "one shape", "use one table layout"
        )
    elif len(cos) != 4 or cos[3] != head or not all(c in (1, None) or c == d for c, d in zip(cos, x, strict=False)):
        wanted = "4 dimensions that broadcast to x, with its head size"
        yield _rotary_finding(node, f"cos {shape_text(cos)} for x {shape_text(x)}", wanted, "reshape the tables")
    elif _is_bnsd(x, cos):
        yield from _bnsd_limit(node, x)


def _is_bnsd(x: Shape, cos: Shape) -> bool:
    """BSND has one table row per position on axis 1; with S = 1 and a single row, axis 1 of x tells."""
    return cos[1] == 1 and x[1] != 1 and cos[2] == x[2]


def _bnsd_limit(node: Node, x: Shape) -> Iterator[Finding]:
    batch, heads, length, head = x
    if batch is None or heads is None or length is None or head is None:
        return
    value = node.input(0)
    bytes_each = 4 if value is not None and value.dtype == "f32" else 2
    if head // 2 * bytes_each % 32 == 0 and batch * heads > 8 * length:
        seen = f"B*N = {batch * heads} in BNSD with S = {length}"
        yield _rotary_finding(node, seen, f"at most 8*S = {8 * length}", "rotate in BSND, before the transpose")


def _rotary_finding(node: Node, seen: str, wanted: str, cure: str) -> Finding:
    certain = node.op == "NPURotaryPositionEmbedding"
    return about(node, "rotary-shape", "EZ9999", certain=certain, seen=seen, wanted=wanted, cure=cure)


def ignored_attributes(context: Context, node: Node) -> Iterator[Finding]:
    """Attributes that look as if they did something, and that the parser does not read."""
    read = _READS_ONLY.get(node.op)
    if read is None or _detailed(context, node) is None:
        return
    for name, value in node.attributes.items():
        if name not in read and value not in _HARMLESS.get(name, ()):
            yield about(
                node,
                "attribute-ignored",
                "",
                effect=WRONG,
                seen=f"{name} {value!r}, which the parser does not read",
                wanted=f"only {', '.join(sorted(read)) or 'no attributes'}",
                cure="write in the graph what it should do (a Transpose, another operator)",
            )


NPU_RULES: tuple[NodeRule, ...] = (usable, operands, attributes, ignored_attributes, rms_norm, rotary)
