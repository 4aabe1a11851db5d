"""Continuous batching: which requests sit in which KV slots, and what the next step computes.

Slots in use are neighbours from 0 on: the decoding ones, then the one whose prompt is still being prefilled:

    | decode | decode | decode | prefill | free | free | free |

so a decode step is one forward pass over the first slots, and a request may join or leave between any two
steps.
"""

from collections import deque
from dataclasses import dataclass
from typing import Deque, List, Optional, Tuple

from .kv_cache import MIN_CHUNK, KVCache
from .sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """A piece of a prompt: tokens [start, end) of `sequence`."""

    sequence: Sequence
    start: int
    end: int

    @property
    def is_last(self) -> bool:
        """Whether the prompt is complete behind it, so that its scores choose the first token."""
        return self.end == len(self.sequence.prompt_ids)


class Scheduler:
    """Waiting requests, and the rows that are being served.

    One prompt is prefilled at a time: the next one is admitted when it is done, and then finds in the cache
    whatever both begin with (a shared system prompt is computed once).

    Args:
        cache: The KV slots.
        max_batch_size: The most requests served at once.
        prefill_chunk: The most prompt tokens computed between two decode steps.
        can_extend: Whether a prompt may be computed in pieces.
    """

    def __init__(self, cache: KVCache, max_batch_size: int, prefill_chunk: int, can_extend: bool) -> None:
        self._cache = cache
        self._max_batch_size = max_batch_size
        self._prefill_chunk = prefill_chunk
        self._can_extend = can_extend
        self.waiting: Deque[Sequence] = deque()
        self._rows: List[Sequence] = []  # the sequence of every slot in use; the last may still be prefilling
        self._num_decoding = 0

    @property
    def has_work(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self.waiting or self._rows)

    @property
    def num_running(self) -> int:
        """Slots in use."""
        return len(self._rows)

    @property
    def num_cached(self) -> int:
        """KV entries of the requests that hold a slot."""
        return sum(sequence.num_cached for sequence in tuple(self._rows))

    @property
    def decoding(self) -> List[Sequence]:
        """Sequences past their prompt, in slot order from slot 0."""
        return self._rows[: self._num_decoding]

    def next_chunk(self, budget: int) -> Optional[Chunk]:
        """Return the next piece of a prompt to compute, admitting a waiting request if none is under way.

        A piece smaller than could be is not taken just because `budget` is nearly used up: it would cost as
        much.

        Raises:
            SessionError: There is no memory for the first waiting request; it still waits.
        """
        if len(self._rows) == self._num_decoding and not (budget > 0 and self._admit()):
            return None
        sequence = self._rows[-1]
        start, end = sequence.num_cached, len(sequence.prompt_ids)
        if self._can_extend:
            end = min(end, start + self._prefill_chunk)
            left = len(sequence.prompt_ids) - end
            if 0 < left < MIN_CHUNK < end - start:
                end -= MIN_CHUNK - left
        return Chunk(sequence, start, end) if end - start <= budget or not self._can_extend else None

    def start_decoding(self, sequence: Sequence) -> None:
        """Count a sequence whose prompt is complete among the decoding ones."""
        assert sequence is self._rows[self._num_decoding]
        self._num_decoding += 1

    def remove(self, sequence: Sequence) -> None:
        """Take a finished or aborted sequence out; the gap is filled with the last row of its kind."""
        if sequence.slot < 0:
            self.waiting.remove(sequence)
            return
        if sequence.slot < self._num_decoding:
            self._num_decoding -= 1
            self._fill_gap(sequence.slot, self._num_decoding)
        self._fill_gap(sequence.slot, len(self._rows) - 1)
        self._rows.pop()
        sequence.slot = -1

    def find(self, request_id: int) -> Optional[Sequence]:
        """Return the waiting or running sequence of a request, or None."""
        for sequence in (*self._rows, *self.waiting):
            if sequence.request_id == request_id:
                return sequence
        return None

    def clear(self) -> Tuple[Sequence, ...]:
        """Drop everything and forget what is cached; returns what was dropped."""
        dropped = (*self._rows, *self.waiting)
        self._rows.clear()
        self.waiting.clear()
        self._num_decoding = 0
        self._cache.forget()
        return dropped

    def _admit(self) -> bool:
        if not self.waiting or len(self._rows) >= self._max_batch_size:
            return False
        sequence, slot = self.waiting[0], len(self._rows)
        self._cache.reserve(slot + 1, len(sequence.prompt_ids) + 1)
        sequence.num_cached = self._cache.claim(slot, sequence.prompt_ids, slot)
        sequence.completion.num_reused_tokens = sequence.num_cached
        sequence.slot = slot
        self._rows.append(self.waiting.popleft())
        return True

    def _fill_gap(self, gap: int, source: int) -> None:
        self._cache.fill_gap(gap, source)
        rows = self._rows
        rows[gap], rows[source] = rows[source], rows[gap]
        rows[gap].slot, rows[source].slot = gap, source
