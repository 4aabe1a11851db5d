"""What rendering one chat template may cost: steps, seconds, and the size of everything it makes."""

import re
import threading
from time import perf_counter
from typing import Any, Dict, Iterable, Iterator, Sequence, Tuple

from jinja2.exceptions import SecurityError

MAX_STEPS = 200_000
MAX_SECONDS = 10.0
_TICKS_PER_LOOK = 512  # how often the clock is read
_MAX_INT_BITS = 4096
_MAX_TOTAL = 32  # all values together, in units of the largest one allowed
_MAX_COUNT = 1_000_000  # the largest width or repetition that a string method or filter is given
_WIDE_OR_NESTED_FIELD = re.compile(r"\d{5}|\{[^{}]*\{")
_COUNTED = frozenset(
    ("batch", "center", "expandtabs", "indent", "ljust", "rjust", "slice", "tojson", "truncate", "wordwrap", "zfill")
)


class BudgetError(SecurityError):
    """A template that loops, calls or builds more than any chat template needs."""


class Budget(threading.local):
    """What the rendering under way (in this thread) has left."""

    def __init__(self) -> None:
        self.start(0)

    def start(self, max_size: int) -> None:
        """Begin a rendering in which no value may be larger than `max_size` characters or items."""
        self._steps = MAX_STEPS
        self._deadline = perf_counter() + MAX_SECONDS
        self._max_size = max_size
        self._total = _MAX_TOTAL * max_size
        self._weights: Dict[int, Tuple[int, Any]] = {}  # by id; holding the value keeps the id its own

    def tick(self) -> None:
        """Count a loop round or a call."""
        self._steps -= 1
        if self._steps < 0:
            raise BudgetError(f"more than {MAX_STEPS} loop rounds and calls")
        if self._steps % _TICKS_PER_LOOK == 0 and perf_counter() > self._deadline:
            raise BudgetError(f"more than {MAX_SECONDS:.0f} seconds")

    def metered(self, values: Iterable[Any]) -> Iterator[Any]:
        """Yield the values of a loop, counting."""
        for value in values:
            self.tick()
            yield value

    def check(self, size: int) -> None:
        """Refuse a value of that size before it is made."""
        if size > self._max_size:
            raise BudgetError(f"a value of {size} characters or items; at most {self._max_size} are allowed")

    def measure(self, value: Any) -> Any:
        """Return a value that an operation has made, if it is not too large."""
        if isinstance(value, int) and value.bit_length() > _MAX_INT_BITS:
            raise BudgetError("an integer of thousands of digits")
        if isinstance(value, (str, bytes, list, tuple, dict)):
            self._total -= len(value)
            if self._total < 0:
                raise BudgetError("many large values")
            self.check(self.weigh(value))
        return value

    def weigh(self, value: Any) -> int:
        """Return the characters and items in a value, counting what it holds several times as often.

        What a container holds does not change once it is made (the sandbox is immutable), so each is weighed once:
        a chain of `[x, x]` is as heavy as its text would be long, without ever being walked.
        """
        if isinstance(value, (str, bytes)):
            return 1 + len(value)
        if isinstance(value, int):
            return 1 + value.bit_length() // 3
        if not isinstance(value, (list, tuple, dict)):
            return 1
        if id(value) not in self._weights:
            parts: Iterable[Any] = value if not isinstance(value, dict) else (*value.keys(), *value.values())
            self._weights[id(value)] = (1 + sum(self.weigh(part) for part in parts), value)
        return self._weights[id(value)][0]

    def check_repetition(self, left: Any, right: Any) -> None:
        """Refuse `text * count` and `count * list` that make too much."""
        value, count = (left, right) if isinstance(right, int) else (right, left)
        if isinstance(count, int) and isinstance(value, (str, bytes, list, tuple)):
            self.check(self.weigh(value) * max(count, 0))

    def check_join(self, separator: str, parts: Any) -> None:
        """Refuse a join that makes too much."""
        if isinstance(parts, (list, tuple)):
            self.check(self.weigh(parts) + len(separator) * len(parts))

    def check_expansion(self, name: str, args: Sequence[Any], kwargs: Dict[str, Any]) -> None:
        """Refuse a string method or filter before it makes much out of little; it works on `args[0]`."""
        values = (*args[1:], *kwargs.values())
        text = str(args[0]) if args and not isinstance(args[0], (list, tuple, dict)) else ""
        if name in _COUNTED:
            self._check_counts(name, values)
        if name in {"format", "format_map"}:
            self._check_format(text, values)
        if name == "replace" and len(values) >= 2:
            old, new = str(values[0]), str(values[1])
            self.check(len(text) + (text.count(old) if old else len(text) + 1) * len(new))
        if name == "indent":
            width = max((v if isinstance(v, int) else len(v) for v in values if isinstance(v, (int, str))), default=4)
            self.check(len(text) + (text.count("\n") + 1) * width)
        if name == "wordwrap":
            self.check(len(text) * max((1 + len(v) for v in values if isinstance(v, str)), default=2))
        if name == "join" and args:
            if isinstance(args[0], str) and len(args) > 1:  # str.join: it is called on the separator
                self.check_join(args[0], args[1])
            else:
                self.check_join(str(args[1]) if len(args) > 1 else "", args[0])

    def _check_counts(self, name: str, values: Sequence[Any]) -> None:
        if any(isinstance(value, int) and abs(value) > _MAX_COUNT for value in values):
            raise BudgetError(f"{name} with a number beyond {_MAX_COUNT}")

    def _check_format(self, text: str, values: Sequence[Any]) -> None:
        if _WIDE_OR_NESTED_FIELD.search(text):
            raise BudgetError("a format with a field of 10000 characters or more, or of computed width")
        if "*" in text:
            self._check_counts(
                "format", [v for value in values for v in (value if isinstance(value, tuple) else [value])]
            )
        fields = text.count("%") + text.count("{")
        self.check(len(text) + fields * max((self.weigh(value) for value in values), default=1))
