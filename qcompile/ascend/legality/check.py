"""`check_model`: every rule over one graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from qcompile.ascend.chips import Cann, Chip, nearest_cann
from qcompile.ascend.legality.attention_rules import ATTENTION_RULES, is_unmasked
from qcompile.ascend.legality.finding import Finding, Report
from qcompile.ascend.legality.form_rules import FORM_MODEL_RULES, FORM_RULES
from qcompile.ascend.legality.model_rules import MODEL_RULES
from qcompile.ascend.legality.node_rules import NODE_RULES
from qcompile.ascend.legality.npu_rules import NPU_RULES
from qcompile.ascend.legality.onnx_file import read_onnx
from qcompile.ascend.legality.operand_rules import OPERAND_MODEL_RULES, OPERAND_RULES
from qcompile.ascend.legality.precision_rules import PRECISION_RULES
from qcompile.ascend.legality.quant_rules import QUANT_RULES
from qcompile.ascend.legality.rule import AtcOptions, Context
from qcompile.ascend.legality.view import GraphView
from qcompile.ascend.operators import Support, operator_table
from qcompile.ascend.plugins import PLUGINS, REMARK

Parsers = Mapping[str, frozenset[tuple[str, int]]]


def check_model(
    path: Path, chip: Chip, cann: Cann, options: AtcOptions | None = None, parsers: Parsers | None = None
) -> Report:
    """Check one ONNX file, made by qcompile or not, without loading its weights.

    Args:
        path: The .onnx file.
        chip: Where it shall run.
        cann: The release that will compile it; one the tables do not know is replaced by the nearest, with a warning.
        options: ATC options that decide about legality.
        parsers: What the installed CANN registers, from `qcompile doctor`'s scan: settles what is only likely.

    Raises:
        GraphError: The file cannot be read, or its external data is missing or truncated.
    """
    options = options or AtcOptions()
    release, warning = nearest_cann(cann)
    file = read_onnx(path)
    file.data_files()
    view = GraphView(file, options.input_shapes)
    context = Context(view, chip, release, operator_table(options.plugins), options, parsers)
    findings = tuple(_deduplicated(_findings(context)))
    warnings = [*([warning] if warning else []), *_unsure_operators(context), *_unmasked(context)]
    used = [name for name, op in PLUGINS.items() if any(node.op == op for node in view.nodes)]
    if used and options.plugins.issuperset(used):
        warnings.append(REMARK.format(", ".join(used)))
    return Report(str(path), chip.name, str(release), findings, tuple(warnings), len(view.nodes))


def _findings(context: Context) -> Iterator[Finding]:
    for model_rule in (*MODEL_RULES, *PRECISION_RULES, *FORM_MODEL_RULES, *OPERAND_MODEL_RULES):
        yield from model_rule(context)
    rules = (*NODE_RULES, *OPERAND_RULES, *FORM_RULES, *NPU_RULES, *ATTENTION_RULES, *QUANT_RULES)
    for node in context.view.nodes:
        for rule in rules:
            yield from rule(context, node)


def _deduplicated(findings: Iterator[Finding]) -> Iterator[Finding]:
    seen = set()
    for finding in findings:
        if finding not in seen:
            seen.add(finding)
            yield finding


def _unsure_operators(context: Context) -> Iterator[str]:
    used = sorted({node.op for node in context.view.nodes} - set(context.parsers or ()))
    operators = [operator for name in used if (operator := context.table.get(name)) is not None]
    for support, words in ((Support.LIKELY, "likely but not proved"), (Support.UNKNOWN, "not known")):
        names = [op.name for op in operators if op.support(context.cann) is support]
        if names:
            yield f"{words} to be parsed by CANN {context.cann}: {', '.join(names)}; `qcompile doctor` there tells"


def _unmasked(context: Context) -> Iterator[str]:
    names = [node.name for node in context.view.nodes if is_unmasked(node)]
    if names:
        yield f"{len(names)} NPUPromptFlashAttention without a mask let every query see every key, such as {names[0]}"
