"""A jinja2 sandbox for templates that nobody has read: no attribute tricks, no endless loop, no giant string.

Chat templates come with checkpoints, so they are untrusted input. jinja2's immutable sandbox keeps them from
reaching Python objects; this adds a budget. Jinja has no `while`: time is spent in `for` loops and calls,
memory is taken by a few operators, literals, methods and filters that make much out of little. Loops and calls
are counted, and what those operations make is measured, each value and all of them together.
"""

from functools import wraps
from typing import Any, Callable, Iterable, List, Mapping, Optional

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from .template_budget import Budget, BudgetError

_BASE_SIZE = 4_000_000


class MeteredSandbox(ImmutableSandboxedEnvironment):
    """The environment to render chat templates with."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.budget = Budget()
        self.globals.pop("lipsum", None)
        self.filters = {name: self.guard(name, function) for name, function in self.filters.items()}
        self.filters["_metered"] = self.budget.metered
        self.filters["_measured"] = self.budget.measure
        self.filters["_concat"] = self._concat_values

    def compile_metered(self, source: str) -> Any:
        """Compile template text with its loops, literals and concatenations metered."""
        return self.from_string(_Meter().visit(self.parse(source)))

    def render(self, template: Any, variables: Mapping[str, Any]) -> str:
        """Render within the budget; what may be made grows with what is given.

        Raises:
            jinja2.TemplateError: The template raised, or used up its budget (BudgetError).
        """
        self.budget.start(0)
        self.budget.start(_BASE_SIZE + 4 * self.budget.weigh(dict(variables)))
        pieces, total = [], 0
        for piece in template.generate(**variables):
            total += len(piece)
            self.budget.check(total)
            pieces.append(piece)
        return "".join(pieces)

    def concat(self, parts: Iterable[str]) -> str:
        """Join the output of a macro or a `{% set %}` block."""
        pieces = list(parts)
        self.budget.check(sum(len(piece) for piece in pieces))
        return "".join(pieces)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call from within a template."""
        __self.budget.tick()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, (str, bytes)):
            __self.budget.check_expansion(__obj.__name__, (owner, *args), kwargs)
        return __self.budget.measure(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Optional[Callable[..., str]]:
        """Guard `str.format`, which jinja2 replaces by a function of its own."""
        function = super().wrap_str_format(value)
        if function is None:
            return None

        @wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> str:
            self.budget.check_expansion("format", (value.__self__, *args), kwargs)
            return function(*args, **kwargs)

        return guarded

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Evaluate one of `intercepted_binops`."""
        numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        if operator == "**" and (not numbers or abs(right) > 64 or abs(left) > 1_000_000):
            raise BudgetError("a power larger than chat templates need")
        if operator == "*":
            self.budget.check_repetition(left, right)
        if operator == "+" and not numbers:
            self.budget.check(self.budget.weigh(left) + self.budget.weigh(right))
        if operator == "%" and isinstance(left, str):
            self.budget.check_expansion("format", (left, right), {})
        return self.budget.measure(super().call_binop(context, operator, left, right))

    def guard(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a filter so that its arguments and its result are measured."""
        offset = 1 if hasattr(function, "jinja_pass_arg") else 0

        @wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.budget.tick()
            values = args[offset:]
            if name == "join" and not isinstance(values[0], (list, tuple)):  # a generator: see what it gives
                values = (self.budget.measure(list(self.budget.metered(values[0]))), *values[1:])
                args = (*args[:offset], *values)
            self.budget.check_expansion(name, values, kwargs)
            return self.budget.measure(function(*args, **kwargs))

        return guarded

    def _concat_values(self, values: List[Any]) -> str:
        self.budget.check_join("", values)
        text: str = self.budget.measure("".join(str(value) for value in values))
        return text


class _Meter(NodeTransformer):
    """Put `for` iterables, list and dict literals and `~` through the environment's meters."""

    def visit_For(self, node: nodes.For) -> Node:  # noqa: N802  (jinja2's naming)
        self.generic_visit(node)
        node.iter = _filter(node.iter, "_metered")
        return node

    def visit_Concat(self, node: nodes.Concat) -> Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "_concat")

    def visit_List(self, node: nodes.List) -> Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(node, "_measured")

    def visit_Dict(self, node: nodes.Dict) -> Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(node, "_measured")

    def visit_Tuple(self, node: nodes.Tuple) -> Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(node, "_measured") if node.ctx == "load" else node


def _filter(value: Any, name: str) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)


class GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks text for training masks; here it is just its content."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> Any:
        """Return the nodes between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
