"""ONNX Runtime with the plain exported graph: `past` goes in, `present` = past + new tokens comes out.

Rows that are computed together form a group: one set of past tensors [n, K, T, d]. As long as the same rows
are asked for, the `present` OrtValues of one step are the `past` of the next, and no number passes through
NumPy. Rows of different lengths share T: what is not theirs is a hole, told to the graph by zeros in
`attention_mask`, and `position_ids` count only valid entries. When rows join, leave or change places, their
valid entries are gathered into a new group (one copy), which also closes the holes.
"""

from typing import Any, Dict, List, Optional, Sequence

import numpy as np

from .errors import SessionError
from .ort_graph import OrtGraph, view
from .session import UNBOUNDED, Scores

_MAX_LOGITS_BYTES = 64 << 20  # a graph that scores every position: bound what one prompt chunk returns


class _Group:
    """Rows computed together.

    Attributes:
        slots: The slot of each row.
        valid: bool [n, T], False at holes.
        past: One OrtValue [n, K, T, d] per cache input.
    """

    def __init__(self, slots: List[int], valid: np.ndarray, past: List[Any]) -> None:
        self.slots = slots
        self.valid = valid
        self.past = past


class ConcatCacheSession:
    """A `Session` over a graph with growing past tensors."""

    def __init__(self, graph: OrtGraph) -> None:
        self.graph = graph
        self.vocab_size = self.num_candidates = graph.shape.vocab_size
        self.can_extend = True
        scores_all = "last_token_index" not in graph.inputs
        row_bytes = self.vocab_size * graph.logits_type.dtype.itemsize
        self.max_chunk = max(16, _MAX_LOGITS_BYTES // row_bytes) if scores_all else UNBOUNDED
        self.max_capacity = UNBOUNDED
        self.num_slots = 0
        self.capacity = 0
        self._groups: Dict[int, _Group] = {}  # by slot; rows of one group share the object

    def reserve(self, num_slots: int, capacity: int) -> None:
        """See Session. Nothing is allocated ahead: tensors grow with what they hold."""
        self.num_slots, self.capacity = max(num_slots, self.num_slots), max(capacity, self.capacity)

    def forward(
        self,
        first_slot: int,
        input_ids: np.ndarray,
        past: Sequence[int],
        need_scores: bool = True,
        greedy_only: bool = False,
    ) -> Optional[Scores]:
        """See Session."""
        n, s = input_ids.shape
        slots = list(range(first_slot, first_slot + n))
        lengths = np.asarray(past, np.int64)
        if int(lengths.max()) + s > self.capacity or slots[-1] >= self.num_slots:
            raise SessionError(f"{int(lengths.max()) + s} entries in slot {slots[-1]}: not reserved")
        group = self._group_of(slots, lengths)
        order = [group.slots.index(slot) for slot in slots]  # rows of a group may stand in another order
        row_of = np.argsort(order)
        outputs = self.graph.run(self._feeds(group, input_ids[row_of], lengths[row_of]))
        group.past = [outputs[name] for name in self.graph.present]
        group.valid = np.concatenate([group.valid, np.ones((n, s), bool)], axis=1)
        if not need_scores:
            return None
        logits = view(outputs["logits"], self.graph.logits_type)[order, -1]
        return Scores(self.graph.logits_type.to_float32(logits))

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """See Session."""
        group = self._new_group([source], [length])
        group.slots = [target]
        self._place(group)

    def swap_slots(self, first: int, second: int, length: int) -> None:
        """See Session. Only labels change."""
        renamed = {first: second, second: first}
        groups = {id(g): g for g in (self._groups.get(first), self._groups.get(second)) if g is not None}
        for group in groups.values():
            group.slots = [renamed.get(slot, slot) for slot in group.slots]
        held = {slot: self._groups.pop(slot) for slot in (first, second) if slot in self._groups}
        self._groups.update({renamed[slot]: group for slot, group in held.items()})

    def close(self) -> None:
        """See Session."""
        self._groups.clear()
        self.num_slots = self.capacity = 0
        self.graph.session = None

    def _group_of(self, slots: List[int], lengths: np.ndarray) -> _Group:
        """Return the group of exactly these slots with these valid lengths, gathering it if need be."""
        group = self._groups.get(slots[0])
        if group is not None and set(group.slots) == set(slots):
            rows = [group.slots.index(slot) for slot in slots]
            if np.array_equal(group.valid.sum(axis=1)[rows], lengths):
                return group
        group = self._new_group(slots, lengths.tolist())
        self._place(group)
        return group

    def _place(self, group: _Group) -> None:
        """Make a new group the holder of its slots; other groups keep their remaining rows."""
        for slot in group.slots:
            old = self._groups.get(slot)
            if old is not None:
                old.slots = [-1 if s == slot else s for s in old.slots]
            self._groups[slot] = group

    def _new_group(self, slots: Sequence[int], lengths: Sequence[int]) -> _Group:
        """Gather the first `lengths` valid entries of each slot into tensors of their own, left-aligned."""
        longest = int(max(lengths))
        valid = np.arange(longest)[None, :] < np.asarray(lengths)[:, None]
        shape = (len(slots), self.graph.shape.num_key_value_heads, longest, self.graph.shape.head_dim)
        tensors = [np.zeros(shape, self.graph.cache_type.dtype) for _ in self.graph.past]
        for row, (slot, length) in enumerate(zip(slots, lengths)):
            if length == 0:
                continue
            source = self._groups[slot]
            source_row = source.slots.index(slot)
            columns = np.flatnonzero(source.valid[source_row])[:length]
            for tensor, value in zip(tensors, source.past):
                tensor[row, :, :length] = view(value, self.graph.cache_type)[source_row][:, columns]
        return _Group(list(slots), valid, [self.graph.value(t, self.graph.cache_type) for t in tensors])

    def _feeds(self, group: _Group, input_ids: np.ndarray, lengths: np.ndarray) -> Dict[str, Any]:
        n, s = input_ids.shape
        mask = np.ones((n, group.valid.shape[1] + s), np.int64)
        mask[:, : group.valid.shape[1]] = group.valid
        arrays: Dict[str, np.ndarray] = {
            "input_ids": np.ascontiguousarray(input_ids, np.int64),
            "attention_mask": mask,
            "position_ids": lengths[:, None] + np.arange(s),
            "last_token_index": np.full(n, s - 1, np.int64),
        }
        from_numpy = self.graph.ort.OrtValue.ortvalue_from_numpy
        feeds = {name: from_numpy(array) for name, array in arrays.items() if name in self.graph.inputs}
        feeds.update(zip(self.graph.past, group.past))
        return feeds
