"""Contexts and streams. Work put on a stream is done when somebody waits for it, never before.

A device may do it at any time in between; doing it as late as possible shows every program that reads a result, or
overwrites a source, without having waited.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


class Context:
    """A context of the device."""

    def __init__(self, *, is_default: bool = False) -> None:
        self.is_default, self.is_alive = is_default, True


@dataclass
class Task:
    """Work on a stream: what it is called, what does it and returns a code, and which bytes it touches."""

    name: str
    run: Callable[[], int]
    ranges: list[tuple[int, int]] = field(default_factory=list)


class Stream:
    """A queue of work in one context."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.tasks: list[Task] = []

    def put(self, task: Task) -> None:
        """Add work."""
        self.tasks.append(task)

    def wait(self) -> int:
        """Do the work in order; the first code that is not 0, and then the rest is dropped, as a device does."""
        tasks, self.tasks = self.tasks, []
        for task in tasks:
            code = task.run()
            if code:
                return code
        return 0
