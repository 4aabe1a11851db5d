"""A thin layer over onnxscript's rewriter: rules that give reasons, passes that prove each rewrite before applying it.

A rule answers three questions: what shape of graph (`pattern`), is it legal (`require`), what instead (`rewrite`). The
pass then runs both sides numerically and applies the rewrite only if they agree; otherwise nothing has changed yet.
"""

from __future__ import annotations

from collections import deque
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import pattern as patterns
from onnxscript.rewriter._basics import MatchResult  # the public module re-exports it without its failure fields

from qcompile.cases import Analysis, Spec
from qcompile.functions import DOMAIN, DOMAIN_VERSION, FusedOp
from qcompile.passes.base import Pass, PassContext, PassResult, Rejection
from qcompile.passes.change import Change, apply_change, finish_rewrites, node_label
from qcompile.passes.proof import Rewrite

OrValue = patterns.OrValue
_NEAR_MISS_LIMIT = 20


class Reject(Exception):
    """Raised by `FusionRule.require`: the structure matched, this is why the rewrite is not legal."""


class FusionRule(patterns.RewriteRuleClassBase):
    """One pattern, its conditions and its replacement. Holds no state but the analysis it reads.

    Attributes:
        emits: The fused operator that `emit` calls; None for rules that write standard operators.
        rows_that_matter: Whether the proof compares only rows that are tokens (attention over padding is undefined).
    """

    emits: ClassVar[FusedOp | None] = None
    rows_that_matter: ClassVar[bool] = False

    def __init__(self, context: PassContext) -> None:
        super().__init__(name=type(self).__name__)
        self.model = context.model
        self.analysis: Analysis = context.analysis

    def check(self, context: Any, **bindings: Any) -> MatchResult:
        """Turn `require` into the rewriter's result with a reason."""
        del context
        result = MatchResult()
        try:
            self.require(**bindings)
        except Reject as reason:
            return result.fail(str(reason))
        return result

    def require(self, **bindings: Any) -> None:
        """Raise Reject when the match must not be rewritten."""

    def emit(self, op: Any, *inputs: ir.Value | None, **attributes: Any) -> Any:
        """Call the rule's fused operator; dtype and shapes of the outputs follow from the analysis."""
        assert self.emits is not None
        count = self.emits.num_outputs
        outputs = getattr(op, self.emits.name)(
            *inputs, **attributes, _domain=DOMAIN, _version=DOMAIN_VERSION, _outputs=count
        )
        return outputs

    # What rules ask of values -----------------------------------------------------------------------------------

    def specs(self, value: ir.Value) -> list[Spec]:
        """Return dtype and concrete shape of a value in every case, or Reject."""
        specs = self.analysis.specs(value)
        if specs is None:
            raise Reject(f"the shape of '{value.name}' could not be inferred")
        return specs

    def dims(self, bound: dict[str, list[int]], value: ir.Value, letters: str) -> None:
        """Unify a value's dimensions with dim letters over all cases: `dims(env, x, "B S D")`.

        A number stands for itself. Reject when the rank differs or a letter already means something else.
        """
        names = letters.split()
        specs = self.specs(value)
        if len(specs[0].shape) != len(names):
            raise Reject(f"'{value.name}' has rank {len(specs[0].shape)}, wanted [{letters}]")
        for axis, letter in enumerate(names):
            seen = [spec.shape[axis] for spec in specs]
            wanted = [int(letter)] * len(seen) if letter.isdigit() else bound.setdefault(letter, seen)
            if seen != wanted:
                raise Reject(f"'{value.name}' axis {axis} is {seen[0]}, wanted {letter} = {wanted[0]}")


def constant(value: ir.Value | None, what: str, max_elements: int = 1 << 16) -> np.ndarray:
    """Return the array of a constant value, or Reject when it is computed or too large to look at."""
    tensor = None if value is None else value.const_value
    if value is None or tensor is None:
        raise Reject(f"{what} is not a constant")
    if tensor.size > max_elements:
        raise Reject(f"{what} has {tensor.size} elements, too many for a constant operand")
    return np.asarray(tensor.numpy())


def scalar(value: ir.Value | None, what: str = "operand") -> float:
    """Return the one number of a constant with a single element, or Reject."""
    array = constant(value, what)
    if array.size != 1:
        raise Reject(f"{what} has {array.size} elements, wanted one")
    return float(array.reshape(()).astype(np.float64))


def is_weight(value: ir.Value | None) -> bool:
    """Whether a value is an initializer (of any size)."""
    return value is not None and value.const_value is not None


def require_same_shape(rule: FusionRule, first: ir.Value, second: ir.Value) -> None:
    """Reject unless two values have the same shape in every case (no broadcasting)."""
    for a, b in zip(rule.specs(first), rule.specs(second), strict=True):
        if a.shape != b.shape:
            raise Reject(f"'{first.name}' is {list(a.shape)} and '{second.name}' {list(b.shape)}: one is broadcast")


def require_row_weight(rule: FusionRule, x: ir.Value, weight: ir.Value, what: str) -> None:
    """Reject unless `weight` is a constant [D] for x [..., D]."""
    array = constant(weight, what)
    last = {spec.shape[-1] for spec in rule.specs(x) if spec.shape}
    if array.ndim != 1 or last != {array.shape[0]}:
        raise Reject(f"{what} has shape {list(array.shape)}, wanted [{', '.join(map(str, sorted(last)))}]")


class RulePass(Pass):
    """A pass made of rules: one sweep over the graph, each rewrite proved, then applied."""

    rules: ClassVar[tuple[type[FusionRule], ...]]

    def call(self, context: PassContext, result: PassResult) -> None:
        """Apply every rule wherever it matches, is legal and is proved."""
        compiled = [(rule, _compile(rule)) for rule in (rule_class(context) for rule_class in self.rules)]
        queue = deque(context.model.graph)
        while queue:
            node = queue.popleft()
            if node.graph is None:
                continue
            for rule, rewriter in compiled:
                outputs = self._try(rule, rewriter, node, context, result)
                if outputs:
                    # What was just written may match again, alone or together with its readers.
                    queue.extend(v.producer() for v in outputs if v.producer() is not None)
                    queue.extend(user for v in outputs for user, _ in v.uses())
                    break
        if result.rewrites:
            finish_rewrites(context)

    def explain(self, context: PassContext) -> list[Rejection]:
        """List the places where a rule's pattern went furthest without matching, with the reason."""
        misses: list[tuple[int, Rejection]] = []
        for rule_class in self.rules:
            rewriter = _compile(rule_class(context))
            for node in context.model.graph:
                match = rewriter._matcher.match(context.model, context.model.graph, node)
                depth = match.num_matched_nodes() if hasattr(match, "num_matched_nodes") else 0
                reason = match.reason if not match else _condition_reason(rewriter, match)
                if depth > 1 and reason:
                    misses.append((depth, Rejection(node_label(node), rule_class.__name__, reason)))
        misses.sort(key=lambda miss: -miss[0])
        return [miss for _, miss in misses[:_NEAR_MISS_LIMIT]]

    def _try(
        self,
        rule: FusionRule,
        rewriter: patterns.RewriteRule,
        node: ir.Node,
        context: PassContext,
        result: PassResult,
    ) -> list[ir.Value]:
        """Try one rule at one node; return the outputs of all new nodes, empty when nothing was applied."""
        graph = context.model.graph
        match = rewriter._matcher.match(context.model, graph, node)
        if not match:
            return []
        result.matches += 1
        reason = _condition_reason(rewriter, match)
        if reason:
            result.rejected.append(Rejection(node_label(node), rule.name, reason))
            return []
        delta = rewriter._replacement_pattern.get_replacement(match)
        if delta is None:
            result.rejected.append(Rejection(node_label(node), rule.name, match.reason or "nothing to replace it with"))
            return []
        rewrite = Rewrite(delta.match.nodes, delta.match.outputs, delta.new_nodes, delta.new_outputs)
        change = Change(rule.name, node, rewrite, delta.new_initializers, rule.rows_that_matter)
        applied = apply_change(context, result, change)
        return [v for n in delta.new_nodes for v in n.outputs] if applied else []


def _compile(rule: FusionRule) -> patterns.RewriteRule:
    return patterns.RewriteRule(rule.pattern, rule.rewrite, rule.check, name=rule.name)


def _condition_reason(rewriter: patterns.RewriteRule, match: MatchResult) -> str:
    """Run the rule's conditions on a structural match; empty when they hold."""
    for variable in rewriter._target_pattern.inputs:
        if variable.name is not None and variable.name not in match.bindings:
            match.bind(variable.name, None)
    verdict = rewriter._condition_function(None, **match.bindings)
    return "" if verdict else (verdict.reason or "a condition does not hold")
