"""What the engine asks of a back end: KV slots, and a forward pass over one chunk of tokens.

Letters: B slots, n rows of one call, S tokens per row, V vocabulary, C candidates, T entries of KV cache.
"""

from dataclasses import dataclass
from typing import Optional, Protocol, Sequence

import numpy as np

UNBOUNDED = 1 << 30  # max_chunk and max_capacity of a session whose graph has open dimensions


@dataclass(frozen=True)
class Scores:
    """The scores of the next token, one row per sequence.

    Attributes:
        values: float32 [n, C], unnormalised. A view of a buffer that the next forward pass overwrites.
        ids: int64 [n, C], the token of each column; None where column c is token c (then C = V). A graph that
            chooses its candidates on the device (top-k, or ArgMax with C = 1) fills it in.
    """

    values: np.ndarray
    ids: Optional[np.ndarray] = None


class Session(Protocol):
    """One loaded model with a KV cache of `num_slots` rows, each of `capacity` entries.

    The session knows nothing of requests: the caller says for every row how many entries of it are valid, and
    a session must never read beyond them. Rows of one call are neighbours (`first_slot`, `first_slot + 1`,
    …), so that a static or shared cache is addressed without copying.

    Attributes:
        vocab_size: V.
        num_candidates: Tokens C that a row has scores of: V, or fewer where the graph chooses them.
        num_slots: Rows of the KV cache (0 before `reserve`).
        capacity: Entries of each row.
        max_capacity: The most entries a row can be given; a graph of fixed shapes has a limit of its own.
        max_chunk: The most tokens per row that one call takes when it is not bounded by the caller.
        can_extend: Whether a chunk of S > 1 may follow earlier entries of its row. If not, a prompt must be
            given whole, at past 0, and only single tokens may follow.
    """

    vocab_size: int
    num_candidates: int
    num_slots: int
    capacity: int
    max_capacity: int
    max_chunk: int
    can_extend: bool

    def reserve(self, num_slots: int, capacity: int) -> None:
        """Make room for that many slots and entries, keeping what is cached. Never shrinks.

        Raises:
            SessionError: There is not enough memory.
        """

    def forward(
        self,
        first_slot: int,
        input_ids: np.ndarray,
        past: Sequence[int],
        need_scores: bool = True,
        greedy_only: bool = False,
    ) -> Optional[Scores]:
        """Append S tokens to each of n neighbouring rows and score what follows the last one.

        Args:
            first_slot: The slot of row 0.
            input_ids: int64 [n, S]. n > 1 only with S = 1 (decode); prefill is one row at a time, so that its
                result does not depend on what else is running.
            past: Valid entries of each row before this call; the new ones go right behind them.
            need_scores: False for a prompt chunk that is not the last.
            greedy_only: Only the most likely token of every row is wanted; a session whose graph chooses it may
                return just that (C = 1). Others return what they have.

        Returns:
            The scores, or None when they were not asked for.

        Raises:
            SessionError: The back end failed. Entries below `past` are intact; the rows can be used again.
        """

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` entries of one row over another row."""

    def swap_slots(self, first: int, second: int, length: int) -> None:
        """Exchange the first `length` entries of two rows."""

    def close(self) -> None:
        """Release the model and the cache; harmless when repeated."""
