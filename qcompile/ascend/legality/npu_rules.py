"""Rules about CANN's own operators: chips, types, attributes, then norms, rotary embedding and attention one by one."""

from __future__ import annotations

from collections.abc import Iterator

from qcompile.ascend.legality.finding import Finding
from qcompile.ascend.legality.rule import WRONG, Context, NodeRule, about, shape_text
from qcompile.ascend.legality.view import Node, Shape
from qcompile.ascend.operators import AttributeRule, Operator

_EPSILON = 1e-6
_MASK_TYPES = {"910B": frozenset({"bool", "i8", "u8"}), "310P": frozenset({"bool"})}
_FULL_TOKENS = 2147483647
_MAX_ROTARY_HEAD, _MAX_ATTENTION_HEAD, _MAX_HIDDEN = 896, 512, 65535


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


def prompt_flash_attention(context: Context, node: Node) -> Iterator[Finding]:
    """NPUPromptFlashAttention: inputs by count, full masks, GQA, and what the 310P leaves out."""
    if node.op != "NPUPromptFlashAttention":
        return
    count = len(node.inputs)
    pse, mask = node.input(3), node.input(4)
    if count == 4 or (count >= 5 and pse is None and context.chip.family == "910B"):
        yield _attention_finding(
            node,
            "attention-inputs",
            "E11010",
            f"{count} inputs{', pse_shift left empty' if count >= 5 else ''}",
            "3 inputs, or at least 5 with a real pse_shift tensor",
            'give pse_shift a constant of zeros (1,N,Qs,KVs): "" still counts as an input',
        )
    if count >= 10 and count != 12:
        yield _attention_finding(
            node, "attention-inputs", "E11010", f"{count} inputs", "3, 5, 7, 9 or 12", "connect all of a group"
        )
    if mask is not None and mask.dtype is not None and mask.dtype not in _MASK_TYPES.get(context.chip.family, ()):
        wanted = ", ".join(sorted(_MASK_TYPES.get(context.chip.family, ())))
        yield _attention_finding(
            node, "attention-mask", "EZ3002", f"a mask of {mask.dtype}", f"{wanted}, True is masked", "cast the mask"
        )
    yield from _attention_attributes(context, node)
    yield from _attention_310p(context, node)


def _attention_attributes(context: Context, node: Node) -> Iterator[Finding]:
    given = node.attributes
    heads, kv_heads = given.get("num_heads"), given.get("num_key_value_heads", 0)
    if isinstance(heads, int) and isinstance(kv_heads, int) and kv_heads and heads % kv_heads:
        seen, wanted = f"{heads} heads over {kv_heads} key/value heads", "a divisor"
        yield _attention_finding(node, "attention-heads", "EZ9999", seen, wanted, "correct num_key_value_heads")
    for name in ("pre_tokens", "next_tokens"):
        if node.input(4) is not None and given.get(name, 0) != _FULL_TOKENS and given.get("sparse_mode", 0) == 0:
            seen = f"{name} {given.get(name, 'absent, which is 0')}"
            yield about(
                node,
                "attention-window",
                "",
                effect=WRONG,
                seen=seen,
                wanted=str(_FULL_TOKENS),
                cure="set it: 0 would mask everything but the diagonal's side",
            )
    if node.input(4) is None and given.get("sparse_mode", 0) == 0:
        yield about(
            node,
            "attention-unmasked",
            "",
            effect=WRONG,
            certain=False,
            seen="no mask and sparse_mode 0",
            wanted="a mask, unless every query may see every key",
            cure="connect a mask (True is masked)",
        )
    yield from _attention_sizes(node, given.get("input_layout"))


def _attention_sizes(node: Node, layout: object) -> Iterator[Finding]:
    query = node.input(0)
    shape = query.shape if query is not None else None
    wanted_rank = 3 if layout == "BSH" else 4
    if shape is None or not isinstance(layout, str):
        return
    if len(shape) != wanted_rank:
        seen = f"query {shape_text(shape)} in layout {layout}"
        yield _attention_finding(node, "attention-shape", "EZ9999", seen, f"{wanted_rank} dimensions", "reshape")
        return
    head = shape[-1] if wanted_rank == 4 else None
    if head is not None and head > _MAX_ATTENTION_HEAD:
        seen, wanted = f"head size {head}", f"at most {_MAX_ATTENTION_HEAD}"
        yield _attention_finding(node, "attention-shape", "EZ9999", seen, wanted, "use MatMul + Softmax + MatMul")
    hidden = {"BSH": shape[-1], "BSND": (shape[-1] or 0) * (shape[-2] or 0)}.get(layout)
    if hidden is not None and hidden >= _MAX_HIDDEN:
        seen = f"{hidden} values per token in {layout}"
        yield _attention_finding(node, "attention-shape", "EZ9999", seen, f"fewer than {_MAX_HIDDEN}", "use BNSD")


def _attention_310p(context: Context, node: Node) -> Iterator[Finding]:
    if context.chip.family != "310P":
        return
    if node.attributes.get("num_key_value_heads", 0):
        seen = f"num_key_value_heads {node.attributes['num_key_value_heads']}"
        yield _attention_finding(node, "attention-310p", "EZ9999", seen, "0 on 310P", "repeat keys and values")
    if node.input(3) is not None:
        yield _attention_finding(node, "attention-310p", "EZ9999", "pse_shift", "none on 310P", "leave it out")
    query, key = node.input(0), node.input(1)
    lengths = [v.shape[2] for v in (query, key) if v is not None and v.shape is not None and len(v.shape) == 4]
    aligned = len(lengths) == 2 and lengths[0] == lengths[1] and (lengths[0] or 1) % 128 == 0
    if node.input(4) is not None and len(lengths) == 2 and not aligned:
        seen = f"a mask with lengths {lengths[0]} and {lengths[1]}"
        wanted = "equal lengths, multiples of 128, on 310P"
        yield _attention_finding(node, "attention-310p", "EZ9999", seen, wanted, "use MatMul + Softmax + MatMul")


def _attention_finding(node: Node, rule: str, code: str, seen: str, wanted: str, cure: str) -> Finding:
    return about(node, rule, code, seen=seen, wanted=wanted, cure=cure)


NPU_RULES: tuple[NodeRule, ...] = (usable, operands, attributes, rms_norm, rotary, prompt_flash_attention)
