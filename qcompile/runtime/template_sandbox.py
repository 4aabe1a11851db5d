"""A jinja2 sandbox for templates that nobody has read: no attribute tricks, no endless loop, no giant string.

Chat templates come with checkpoints, so they are untrusted input. jinja2's immutable sandbox keeps them from
reaching Python objects; this adds a budget. Jinja has no `while`: time is spent in `for` loops and calls,
memory is taken by a few operators, methods and filters that make much out of little. Loops and calls count
against `MAX_STEPS`; what those operations make is measured, each value and all of them together.
"""

import re
import threading
from functools import wraps
from typing import Any, Callable, Dict, Iterable, Iterator, Mapping

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.nodes import Node, Template
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_STEPS = 500_000
_MAX_INT_BITS = 4096
_MAX_TOTAL = 32  # all values together, in units of the largest one allowed
_MAX_COUNT = 1_000_000  # the largest number a string method or filter is given: widths, indents, repetitions
_WIDE_FIELD = re.compile(r"\d{5}")


class BudgetError(SecurityError):
    """A template that loops, calls or builds more than any chat template needs."""


class _Budget(threading.local):
    """What the rendering under way (in this thread) has left."""

    steps = MAX_STEPS
    max_size = 0
    max_total = 0

    def start(self, max_size: int) -> None:
        self.steps, self.max_size, self.max_total = MAX_STEPS, max_size, _MAX_TOTAL * max_size

    def tick(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise BudgetError(f"more than {MAX_STEPS} loop rounds and calls")

    def check(self, size: int) -> None:
        if size > self.max_size:
            raise BudgetError(f"a value of {size} characters or items; at most {self.max_size} are allowed")

    def measure(self, value: Any) -> Any:
        if isinstance(value, (str, bytes, list, tuple, dict)):
            self.check(len(value))
            self.max_total -= len(value)
            if self.max_total < 0:
                raise BudgetError("many large values")
        elif isinstance(value, int) and value.bit_length() > _MAX_INT_BITS:
            raise BudgetError("an integer of thousands of digits")
        return value

    def metered(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.tick()
            yield value


class MeteredSandbox(ImmutableSandboxedEnvironment):
    """The environment to render chat templates with."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.budget = _Budget()
        self.globals.pop("lipsum", None)
        self.filters = {name: self.guard(name, function) for name, function in self.filters.items()}
        self.filters["_metered"] = self.budget.metered
        self.filters["_concat"] = lambda parts: self._join("", parts)

    def compile_metered(self, source: str) -> Any:
        """Compile template text with its loops and concatenations metered."""
        return self.from_string(_Meter().visit(self.parse(source)))

    def render(self, template: Any, variables: Mapping[str, Any], max_size: int) -> str:
        """Render within the budget; no value, and not the result, may be larger than `max_size`.

        Raises:
            jinja2.TemplateError: The template raised, or used up its budget (BudgetError).
        """
        self.budget.start(max_size)
        pieces, total = [], 0
        for piece in template.generate(**variables):
            total += len(piece)
            self.budget.check(total)
            pieces.append(piece)
        return "".join(pieces)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call from within a template."""
        __self.budget.tick()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, (str, bytes)):
            __self._check_expansion(__obj.__name__, (owner, *args), kwargs)
        return __self.budget.measure(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Evaluate one of `intercepted_binops`."""
        numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        if operator == "**" and (not numbers or abs(right) > 64 or abs(left) > _MAX_COUNT):
            raise BudgetError("a power larger than chat templates need")
        if operator == "*" and not numbers:
            sized, count = (left, right) if isinstance(right, int) else (right, left)
            if isinstance(count, int) and hasattr(sized, "__len__"):
                self.budget.check(len(sized) * max(count, 0))
        if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            self.budget.check(len(left) + len(right))
        if operator == "%" and isinstance(left, str):
            self._check_expansion("format", (left, right), {})
        return self.budget.measure(super().call_binop(context, operator, left, right))

    def guard(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a filter so that its arguments and its result are measured."""
        offset = 1 if hasattr(function, "jinja_pass_arg") else 0

        @wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.budget.tick()
            values = args[offset:]
            if name == "join":
                values = (self.budget.measure(list(self.budget.metered(values[0]))), *values[1:])
                args = (*args[:offset], *values)
            self._check_expansion(name, values, kwargs)
            return self.budget.measure(function(*args, **kwargs))

        return guarded

    def _check_expansion(self, name: str, args: Any, kwargs: Dict[str, Any]) -> None:
        """Refuse a string operation before it makes much out of little; `args[0]` is what it works on."""
        values = (*args[1:], *kwargs.values())
        for value in values:
            numbers = value if isinstance(value, tuple) else (value,)
            if any(isinstance(number, int) and abs(number) > _MAX_COUNT for number in numbers):
                raise BudgetError(f"{name} with a number beyond {_MAX_COUNT}")
        text = args[0] if args else ""
        if name in {"format", "format_map"} and _WIDE_FIELD.search(str(text)):
            raise BudgetError("a format with a field of 10000 characters or more")
        if name == "replace" and len(values) >= 2:
            old, new = str(values[0]), str(values[1])
            found = str(text).count(old) if old else len(str(text)) + 1
            self.budget.check(len(str(text)) + found * len(new))
        if name == "indent":
            width = next((v for v in values if isinstance(v, (int, str)) and not isinstance(v, bool)), 4)
            self.budget.check((str(text).count("\n") + 1) * (width if isinstance(width, int) else len(width)))
        if name == "join":
            parts, separator = (text, args[1] if len(args) > 1 else "")
            if isinstance(text, str) and len(args) > 1:  # str.join: the separator is what it is called on
                parts, separator = args[1], text
            self._measure_join(str(separator), parts)

    def _measure_join(self, separator: str, parts: Any) -> None:
        if isinstance(parts, (list, tuple)):
            lengths = sum(len(part) for part in parts if isinstance(part, str))
            self.budget.check(lengths + len(separator) * len(parts))

    def _join(self, separator: str, parts: Any) -> str:
        self._measure_join(separator, parts)
        return separator.join(str(part) for part in parts)


class _Meter(NodeTransformer):
    """Put every `for` iterable and every `~` through the environment's meters."""

    def visit_For(self, node: nodes.For) -> Node:  # noqa: N802  (jinja2's naming)
        self.generic_visit(node)
        node.iter = _filter(node.iter, "_metered")
        return node

    def visit_Concat(self, node: nodes.Concat) -> Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "_concat")


def _filter(value: Any, name: str) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)


class GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks text for training masks; here it is just its content."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> Any:
        """Return the nodes between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


__all__ = ["BudgetError", "GenerationTag", "MeteredSandbox", "Template"]
