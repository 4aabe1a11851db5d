"""What is timed: batch sizes and context lengths, each in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BATCHES = (1, 4, 8)
CONTEXTS = (128, 1024)


@dataclass(frozen=True)
class Case:
    """One way of using a model.

    Attributes:
        batch: Requests running together.
        context: Prompt tokens of each.
        steps: Decode steps timed, each giving `batch` tokens.
    """

    batch: int
    context: int
    steps: int

    @property
    def name(self) -> str:
        """Short name for tables."""
        return f"batch {self.batch}, context {self.context}"

    @property
    def room(self) -> int:
        """The most tokens a request may come to.

        While later prompts are computed (in chunks of 64 or more), earlier requests already decode.
        """
        return self.context + self.steps + 2 + self.batch * (-(-self.context // 64) + 1)


def cases_of(*, quick: bool, batches: Sequence[int] = BATCHES, contexts: Sequence[int] = CONTEXTS) -> list[Case]:
    """Return every combination; a quick run leaves out the middle batch sizes and large batches at long contexts."""
    steps = 16 if quick else 48
    found = [Case(batch, context, steps) for batch in batches for context in contexts]
    if quick:
        shortest, largest = min(contexts), max(batches)
        found = [c for c in found if c.batch == 1 or (c.batch == largest and c.context == shortest)]
    return found


def prompts_of(text_ids: Sequence[int], case: Case) -> list[list[int]]:
    """Cut different prompts out of a text, going round when it is too short.

    Args:
        text_ids: At least one token.
        case: Says how many and how long.
    """
    total = len(text_ids)
    return [[text_ids[(row * 777 + i) % total] for i in range(case.context)] for row in range(case.batch)]
