"""A thin layer over onnxscript's rewriter: rules that give reasons, passes that prove each rewrite before applying it.

A rule answers three questions: what shape of graph (`pattern`), is it legal (`require`), what instead (`rewrite`). The
pass then runs both sides numerically and applies the rewrite only if they agree; otherwise nothing has changed yet.
"""

from __future__ import annotations

import abc
from collections import deque
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import pattern as patterns
from onnxscript.rewriter._basics import MatchResult  # the public module re-exports it without its failure fields

from qcompile.analysis import Analysis, Spec
from qcompile.functions import DOMAIN, DOMAIN_VERSION, FusedOp
from qcompile.passes.base import Pass, PassContext, PassResult, Rejection
from qcompile.passes.change import Change, apply_change, finish_rewrites
from qcompile.passes.matching import Matcher, node_label
from qcompile.passes.proof import Rewrite

OrValue = patterns.OrValue
_NEAR_MISS_LIMIT = 20
# How far a literal may be from its number, beyond 1e-3: bfloat16 has 8 bits.
_LITERAL_ERROR = {ir.DataType.BFLOAT16: 4e-3}


class Reject(Exception):
    """Raised by `FusionRule.require`: this is what the rule looks for, and this is why it must stay as it is."""


class Mismatch(Reject):
    """Raised by `FusionRule.require`: the structure resembles the pattern but is something else; nobody is told."""


class FusionRule(abc.ABC):
    """One pattern, its conditions and its replacement. Holds no state but the analysis it reads.

    The parameters of `pattern` after `op` name the values of a match; `require` and `rewrite` get them by these names.

    Attributes:
        emits: The fused operator that `emit` calls; None for rules that write standard operators.
        landmark: Operator type by which people recognize the pattern: near misses are told per node of it.
        rounds_literals: Whether numbers that were constants of the graph's dtype become exact, or the reverse.
        rows_that_matter: Whether the proof compares only rows that are tokens (attention over padding is undefined).
    """

    emits: ClassVar[FusedOp | None] = None
    landmark: ClassVar[str] = ""
    rows_that_matter: ClassVar[bool] = False
    rounds_literals: ClassVar[bool] = False

    def __init__(self, context: PassContext) -> None:
        self.name = type(self).__name__
        self.model = context.model
        self.analysis: Analysis = context.analysis

    @abc.abstractmethod
    def pattern(self, op: Any, *operands: Any, **bindings: Any) -> Any:
        """Return the value that stands for the whole pattern, or a tuple when several of its values are read."""

    @abc.abstractmethod
    def rewrite(self, op: Any, *operands: Any, **bindings: Any) -> Any:
        """Return what takes the place of the pattern's values, in the same order."""

    def check(self, **bindings: Any) -> MatchResult:
        """Turn `require` into the rewriter's result with a reason."""
        result = MatchResult()
        try:
            self.require(**bindings)
        except Mismatch:
            return result.fail()
        except Reject as reason:
            return result.fail(str(reason) or "a condition does not hold")
        return result

    def require(self, *operands: Any, **bindings: Any) -> None:
        """Raise Reject when the match must not be rewritten; by default every match may be."""
        del operands, bindings

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


class SpellingRule(FusionRule):
    """A rule that only changes a spelling: where it does not apply, nothing was missed and nobody is told."""

    def check(self, **bindings: Any) -> MatchResult:
        """As in FusionRule, without reasons."""
        verdict = super().check(**bindings)
        return verdict if verdict else MatchResult().fail()


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


def require_near(value: ir.Value | None, wanted: float, what: str, relative: float | None = None) -> None:
    """Reject unless a value is a constant with one element near a number; by default as near as half precision writes it."""
    number = scalar(value, what)
    if relative is None:
        assert value is not None
        relative = _LITERAL_ERROR.get(value.const_value.dtype if value.const_value else ir.DataType.FLOAT, 1e-3)
    if abs(number - wanted) > relative * abs(wanted):
        raise Reject(f"{what} is {number:.6g}, wanted {wanted:.6g}")


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
        compiled = [_Compiled(rule_class(context)) for rule_class in self.rules]
        refused: dict[tuple[ir.Node, str], Rejection] = {}
        queue = deque(context.model.graph)
        while queue:
            node = queue.popleft()
            if node.graph is None:
                continue
            for rule in compiled:
                outputs = _apply(rule, node, context, result, refused)
                if outputs:
                    # What was just written may match again, alone or together with its readers.
                    queue.extend(producer for v in outputs if (producer := v.producer()) is not None)
                    queue.extend(user for v in outputs for user, _ in v.uses())
                    break
        # A node that one rule refused and another rewrote is no refusal.
        result.rejected += [rejection for (node, _), rejection in refused.items() if node.graph is not None]
        result.matches = result.rewrites + len(result.rejected)
        if result.rewrites:
            finish_rewrites(context)

    def explain(self, context: PassContext) -> list[Rejection]:
        """List the places where a pattern went furthest without being applied: one per landmark, with the reason."""
        best: dict[ir.Node, tuple[int, Rejection]] = {}
        for rule_class in self.rules:
            rule = _Compiled(rule_class(context))
            for node in context.model.graph:
                nodes, reason = rule.obstacle(node, context.model)
                marks = [n for n in nodes if n.op_type == rule.rule.landmark] if rule.rule.landmark else nodes[:1]
                if not reason or not marks or len(nodes) < min(2, rule.size):
                    continue
                depth, _ = best.get(marks[-1], (0, None))
                if len(nodes) > depth:
                    best[marks[-1]] = (len(nodes), Rejection(node_label(node), rule.rule.name, reason))
        misses = sorted(best.values(), key=lambda miss: -miss[0])
        return [rejection for _, rejection in misses[:_NEAR_MISS_LIMIT]]


class _Compiled:
    """A rule with its pattern ready for matching."""

    def __init__(self, rule: FusionRule) -> None:
        self.rule = rule
        self.rewriter = patterns.RewriteRule(rule.pattern, rule.rewrite, matcher=Matcher, name=rule.name)
        assert isinstance(self.rewriter._matcher, Matcher)
        self.matcher = self.rewriter._matcher
        self.size = self.rewriter._target_pattern.num_nodes()

    def match(self, node: ir.Node, model: ir.Model) -> MatchResult | None:
        """Return the structural match at a node, or None."""
        if node.op_type != self.matcher.root_op_type:
            return None
        match = self.matcher.match(model, model.graph, node)
        return match if match else None

    def refusal(self, match: MatchResult) -> str | None:
        """Run the rule's conditions; None when they hold, empty when the match is something else altogether."""
        for variable in self.rewriter._target_pattern.inputs:
            if variable.name is not None and variable.name not in match.bindings:
                match.bind(variable.name, None)
        verdict = self.rule.check(**match.bindings)
        return None if verdict else verdict.reason

    def obstacle(self, node: ir.Node, model: ir.Model) -> tuple[Sequence[ir.Node], str]:
        """Return the nodes that match at a root and what is in the way; no reason when nothing resembles the rule."""
        if node.op_type != self.matcher.root_op_type:
            return (), ""
        match = self.matcher.match(model, model.graph, node)
        if match:
            return match.nodes, self.refusal(match) or ""
        return self.matcher.deepest.nodes, self.matcher.deepest.reason


def _apply(
    compiled: _Compiled,
    node: ir.Node,
    context: PassContext,
    result: PassResult,
    refused: dict[tuple[ir.Node, str], Rejection],
) -> list[ir.Value]:
    """Try one rule at one node; return the outputs of all new nodes, empty when nothing was applied."""
    match = compiled.match(node, context.model)
    if match is None:
        return []
    rule = compiled.rule
    key = (node, rule.name)
    reason = compiled.refusal(match)
    if reason is not None:
        if reason:
            refused[key] = Rejection(node_label(node), key[1], reason)
        return []
    delta = compiled.rewriter._replacement_pattern.get_replacement(match)
    if delta is None:
        return []
    rewrite = Rewrite(delta.match.nodes, delta.match.outputs, delta.new_nodes, delta.new_outputs)
    change = Change(
        key[1],
        node,
        rewrite,
        delta.new_initializers,
        rows_that_matter=rule.rows_that_matter,
        rounds_literals=rule.rounds_literals,
    )
    if apply_change(context, result, change):
        return [v for n in delta.new_nodes for v in n.outputs]
    refused[key] = result.rejected.pop()
    return []
