"""Rules about any node: is it parsed at its opset, is it valid ONNX, has the chip a kernel for its types."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from qcompile.ascend.chips import Cann
from qcompile.ascend.legality.finding import Finding
from qcompile.ascend.legality.rule import REFUSED, SLOW, Context, NodeRule, about
from qcompile.ascend.legality.types import FLOATS
from qcompile.ascend.legality.view import Node
from qcompile.ascend.operators import Operator, Registration, Support

_NEW_PARSER = Cann(8, 1)  # E16002 instead of E19010
_ARITHMETIC = frozenset(
    {
        "Add", "Sub", "Mul", "Div", "Pow", "Mod", "Neg", "Abs", "Sqrt", "Min", "Max", "Sum", "Mean", "CumSum", "MatMul",
        "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "Clip", "Sign", "Range",
    }
)  # fmt: skip
_COMPARISON = frozenset({"Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"})
_LOGIC = frozenset({"And", "Or", "Not", "Xor"})
_DATA_DEPENDENT = frozenset({"NonZero", "Unique", "Compress", "NonMaxSuppression"})


def unregistered_code(cann: Cann) -> str:
    """Return the code a release gives for an op type without parser."""
    return "E16002" if cann >= _NEW_PARSER else "E19010"


def is_registered(context: Context, node: Node) -> Iterator[Finding]:
    """Domain, op type and opset together are the key of the parser's registry."""
    operator = context.table.get(node.op)
    domain = node.proto.domain
    functions = {(f.domain, f.name) for f in context.view.model.functions}
    code = unregistered_code(context.cann)
    if (domain, node.op) in functions:
        yield about(
            node,
            "function-call",
            code,
            seen=f"a call of the ONNX function {domain}::{node.op}",
            wanted="registered operators only",
            cure="inline it: `qcompile optimize` with an Ascend target does",
        )
    elif operator is None or (domain not in {"", "ai.onnx", "npu"} and domain not in operator.registrations):
        cure = context.table.absent.get(node.op, "replace it by registered operators, or write a parser plugin")
        where = f"{domain}::{node.op}" if domain else node.op
        yield about(
            node,
            "op-unregistered",
            code,
            seen=f"{where}, which no ONNX parser of CANN takes",
            wanted="a registered operator",
            cure=cure,
        )
    else:
        yield from _is_registered_at(context, node, operator, code)


def _is_registered_at(context: Context, node: Node, operator: Operator, code: str) -> Iterator[Finding]:
    domain = node.proto.domain
    key = "" if domain == "ai.onnx" else domain
    registration = operator.registrations.get(key)
    if registration is None:
        spelled = ", ".join(f"'{name}' {span}" for name, span in operator.registrations.items())
        cure = _domain_cure(operator)
        yield about(
            node,
            "domain-unregistered",
            code,
            seen=f"{node.op} in domain '{domain}'",
            wanted=f"domain {spelled}",
            cure=cure,
        )
        return
    opset = context.view.opset(domain)
    if context.parsers is not None and operator.is_detailed and node.op not in context.parsers:
        yield about(
            node,
            "op-not-installed",
            code,
            certain=operator.support(context.cann) is not Support.CERTAIN,  # else the scan may have missed it
            seen=f"{node.op}, which the ONNX parsers installed here do not register",
            wanted="an operator that `qcompile doctor` lists",
            cure="update CANN, or lower without it",
        )
    elif opset is None and domain:
        yield about(
            node,
            "domain-not-imported",
            "E19999",
            seen=f"{node.op} in domain '{domain}', which opset_import does not name",
            wanted="the very same spelling in opset_import",
            cure='use domain "" everywhere, with one opset_import',
        )
    elif opset is None:
        yield from _implicit_domain(context, node)
    elif not registration.holds(opset):
        yield _opset_finding(node, code, opset, registration)


def _implicit_domain(context: Context, node: Node) -> Iterator[Finding]:
    imports = ", ".join(f"'{o.domain}' {o.version}" for o in context.view.model.opset_import)
    if imports and context.cann < Cann(9, 2):
        yield about(
            node,
            "domain-spelling",
            unregistered_code(context.cann),
            certain=False,
            seen=f"a node without domain while opset_import has {imports}",
            wanted='an opset_import of domain ""',
            cure='"" and "ai.onnx" are different names to this parser: import "" at opset 16',
        )


def _domain_cure(operator: Operator) -> str:
    if "" not in operator.registrations:
        return f"{operator.name} is registered under npu only, which the single opset_import rules out: use standard operators"
    return 'put the node into domain ""'


def _opset_finding(node: Node, code: str, opset: int, registration: Registration) -> Finding:
    direction = "convert the model to opset 16 (all operators a language model needs are registered there)"
    if opset < registration.first and registration.first > 16:
        direction = f"{node.op} exists from opset {registration.first} on: inline it at opset 16, or use that opset"
    return about(
        node,
        "opset-unregistered",
        code,
        seen=f"{node.op} at opset {opset}",
        wanted=f"opset {registration}",
        cure=direction,
    )


def is_valid_onnx(context: Context, node: Node) -> Iterator[Finding]:
    """Standard operators have the inputs, outputs and attributes that ONNX asks for."""
    schema, opset = context.schema(node), context.view.opset("")
    if schema is None or opset is None:
        return
    given = len(node.proto.input)
    while given and not node.proto.input[given - 1]:
        given -= 1
    if not schema.min_input <= given <= schema.max_input:
        yield about(
            node,
            "input-count",
            "E11010",
            seen=f"{given} inputs",
            wanted=f"{schema.min_input} to {schema.max_input} at opset {opset}",
            cure=f"write {node.op} as opset {opset} has it",
        )
    kinds = {a.name: a.type for a in node.proto.attribute}
    missing = [name for name, a in schema.attributes.items() if a.required and name not in kinds]
    if missing:
        yield about(
            node,
            "attribute-missing",
            "E11010",
            seen=f"no attribute {', '.join(missing)}",
            wanted=f"the attributes {node.op} needs at opset {opset}",
            cure="add it",
        )
    yield from _attribute_kinds(node, schema, kinds)
    unknown = [name for name in kinds if name not in schema.attributes]
    if unknown and not node.op.startswith("NPU"):
        yield from _unknown_attribute(context, node, unknown, opset)


def _attribute_kinds(node: Node, schema: onnx.defs.OpSchema, kinds: dict[str, int]) -> Iterator[Finding]:
    for name, kind in kinds.items():
        known = (
            onnx.AttributeProto.AttributeType.Name(kind) if kind in onnx.AttributeProto.AttributeType.values() else "?"
        )
        declared = schema.attributes.get(name)
        if declared is not None and kind and declared.type != getattr(onnx.defs.OpSchema.AttrType, known, None):
            yield about(
                node,
                "attribute-kind",
                "E11010",
                seen=f"the attribute {name} as {known}",
                wanted=f"{name} as {node.op} has it",
                cure="correct the attribute",
            )


def _unknown_attribute(context: Context, node: Node, unknown: list[str], opset: int) -> Iterator[Finding]:
    if node.op == "MatMul" and set(unknown) <= {"transA", "transB"}:
        return  # the parser of CANN reads them
    yield about(
        node,
        "attribute-of-another-opset",
        "E11010",
        certain=False,
        seen=f"the attribute {', '.join(unknown)}",
        wanted=f"{node.op} as opset {opset} has it",
        cure="the parser would ignore it or refuse the node: convert the node to the model's opset",
    )


def has_kernel(context: Context, node: Node) -> Iterator[Finding]:
    """Standard operators: the AI core has kernels for some types; integers fall back to the AI CPU, small floats do not."""
    operator = context.table.get(node.op)
    if operator is None or operator.is_detailed or _runs_once(node):
        return
    for value, port in zip(node.inputs, operator.inputs, strict=False):
        if value is None or value.dtype is None or port.takes(value.dtype, context.chip.floats):
            continue
        if value.dtype in FLOATS or value.dtype in {"i4", "f64"}:
            is_double = value.dtype == "f64"
            yield about(
                node,
                "dtype",
                "W11001" if is_double else "EZ3002",
                effect=SLOW if is_double else REFUSED,
                certain=context.chip.family == "910B",
                seen=f"{value.dtype} for {port.name}",
                wanted=f"{_spelled(port.dtypes)} on {context.chip.name}",
                cure="cast to fp16 or fp32 around the node",
            )
            return


def no_int64_arithmetic(context: Context, node: Node) -> Iterator[Finding]:
    """Arithmetic on int64 and double runs on the AI CPU."""
    if _runs_once(node) or node.op not in _ARITHMETIC | _COMPARISON:
        return
    data = node.inputs[:1] if node.op.startswith("Reduce") or node.op == "CumSum" else node.inputs
    dtypes = {value.dtype for value in data if value is not None}
    for dtype in ("i64", "f64"):
        if dtype in dtypes:
            yield about(
                node,
                "int64-arithmetic" if dtype == "i64" else "double-arithmetic",
                "W11001",
                effect=SLOW,
                seen=f"{node.op} of {dtype} on the device",
                wanted="fp16, fp32 or int32",
                cure="compute it before the graph and pass it as an input, or fold it into a constant",
            )


def no_bool_arithmetic(context: Context, node: Node) -> Iterator[Finding]:
    """Masks built from bool tensors run on the AI CPU."""
    if _runs_once(node):
        return
    dtypes = {value.dtype for value in node.inputs if value is not None}
    is_cast = node.op == "Cast" and "bool" in dtypes and _feeds_arithmetic(node)
    if node.op in _LOGIC or ("bool" in dtypes and node.op in _ARITHMETIC) or is_cast:
        yield about(
            node,
            "bool-arithmetic",
            "W11001",
            effect=SLOW,
            seen=f"{node.op} of bool on the device",
            wanted="masks computed before the graph",
            cure="pass an additive fp16 mask (0 and -65504) as an input",
        )


def no_data_dependent_shapes(context: Context, node: Node) -> Iterator[Finding]:
    """Shapes that depend on values make the whole graph dynamic."""
    if node.op in _DATA_DEPENDENT and not _runs_once(node):
        yield about(
            node,
            "data-dependent-shape",
            "E10055",
            certain=False,
            seen=f"{node.op}, whose output shape depends on values",
            wanted="shapes known at compile time",
            cure="compute it on the host",
        )
    dynamic = node.op in {"Range", "ConstantOfShape", "Expand", "Reshape"} and context.view.inputs
    if dynamic and not _runs_once(node) and all(v.is_static for v in context.view.inputs):
        shape_input = node.input(1) if node.op in {"Expand", "Reshape"} else node.input(0)
        if shape_input is not None and not shape_input.is_foldable and not shape_input.is_input:
            yield about(
                node,
                "dynamic-shape-chain",
                "E10055",
                certain=False,
                effect=SLOW,
                seen=f"a {node.op} whose shape is computed in the graph",
                wanted="a constant",
                cure="fold it: with static inputs all shapes are known",
            )


def _runs_once(node: Node) -> bool:
    outputs = [value for value in node.outputs if value is not None]
    return bool(outputs) and all(value.is_foldable for value in outputs)


def _feeds_arithmetic(node: Node) -> bool:
    return any(reader.op in _ARITHMETIC for value in node.outputs if value is not None for reader in value.readers)


def _spelled(dtypes: frozenset[str]) -> str:
    return ", ".join(sorted(dtypes))


NODE_RULES: tuple[NodeRule, ...] = (
    is_registered,
    is_valid_onnx,
    has_kernel,
    no_int64_arithmetic,
    no_bool_arithmetic,
    no_data_dependent_shapes,
)
