"""Which tokens every KV slot holds: growth, exchange of slots, and reuse of common prefixes."""

import logging
from typing import List, Sequence

from .session import Session

MIN_CHUNK = 2  # tokens of a prompt that are computed together at the least, where it has so many
_MIN_COPIED_PREFIX = 16  # a shorter prefix in another slot is sooner computed than copied
_FIRST_CAPACITY = 1024
_LOGGED_CAPACITY = 4096  # beyond this a growth is worth saying

logger = logging.getLogger(__name__)


class KVCache:
    """The bookkeeping over a session's slots.

    A slot keeps its tokens after its request is done, for whoever comes next.

    Args:
        session: Holds the numbers.
        max_slots: The most slots to reserve.
        max_capacity: The most entries of a slot.
        reuse_prefixes: Whether to look for the beginning of new prompts in what slots hold.
    """

    def __init__(self, session: Session, max_slots: int, max_capacity: int, reuse_prefixes: bool = True) -> None:
        self._session = session
        self._max_slots = max_slots
        self._max_capacity = max_capacity
        self._reuse_prefixes = reuse_prefixes and session.can_extend
        self._tokens: List[List[int]] = []

    def reserve(self, num_slots: int, length: int) -> None:
        """Make room for `num_slots` slots of `length` entries; doubles, so that growth is rare.

        Raises:
            SessionError: There is not enough memory.
        """
        capacity = max(self._session.capacity, min(_FIRST_CAPACITY, self._max_capacity))
        while capacity < length:
            capacity *= 2
        slots = max(self._session.num_slots, 1)
        while slots < num_slots:
            slots *= 2
        capacity = max(length, min(capacity, self._max_capacity))
        if capacity > max(self._session.capacity, _LOGGED_CAPACITY):
            logger.info("KV cache grows to %d tokens per slot (up to %d)", capacity, self._max_capacity)
        self._session.reserve(min(slots, self._max_slots), capacity)
        while len(self._tokens) < self._session.num_slots:
            self._tokens.append([])

    def claim(self, slot: int, prompt_ids: Sequence[int], num_busy: int) -> int:
        """Prepare a slot for a prompt, with the longest cached prefix of it that any slot holds.

        Args:
            slot: The slot to fill; every slot from `num_busy` on is free.
            prompt_ids: At least the last one is left to compute: its scores are wanted. Where there are two, two are
                left: kernels sum in another order for a single token (attention for S = 1 is another one), and an
                answer must not depend on what happened to be cached.
            num_busy: Slots in use.

        Returns:
            How many entries of the slot are valid for this prompt.
        """
        if not self._reuse_prefixes:
            self._tokens[slot] = []
            return 0
        limit = max(len(prompt_ids) - MIN_CHUNK, 0)
        lengths = [min(limit, _common_prefix(tokens, prompt_ids)) for tokens in self._tokens]
        best = max(range(len(lengths)), key=lambda s: (lengths[s], s == slot))
        if lengths[best] <= lengths[slot]:
            best = slot
        length = lengths[best]
        if best != slot and length < _MIN_COPIED_PREFIX:
            best, length = slot, lengths[slot]
        if best >= num_busy and best != slot:
            self._swap(best, slot)
        elif best != slot:
            self._session.copy_slot(best, slot, length)
        self._tokens[slot] = list(prompt_ids[:length])
        return length

    def extend(self, slot: int, token_ids: Sequence[int]) -> None:
        """Note tokens whose entries a forward pass has just written."""
        self._tokens[slot].extend(token_ids)

    def fill_gap(self, gap: int, source: int) -> None:
        """Move a row into a gap; if prefixes are reused, what the gap holds goes to the old place."""
        if gap == source:
            return
        if self._reuse_prefixes:
            self._swap(gap, source)
        else:
            self._session.copy_slot(source, gap, len(self._tokens[source]))
            self._tokens[gap], self._tokens[source] = self._tokens[source], []

    def forget(self) -> None:
        """Reuse nothing of what is cached (after a failure)."""
        self._tokens = [[] for _ in self._tokens]

    def _swap(self, first: int, second: int) -> None:
        tokens = self._tokens
        self._session.swap_slots(first, second, max(len(tokens[first]), len(tokens[second])))
        tokens[first], tokens[second] = tokens[second], tokens[first]


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the common prefix, by halving: slices compare in C.

    Up to `low` the two agree, up to `high` they do not.
    """
    low, high = 0, min(len(first), len(second))
    if first[:high] == second[:high]:
        return high
    while low + 1 < high:
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return low
