"""ONNX Runtime with a shared KV cache: past and present are one preallocated buffer, written in place.

The graph holds com.microsoft::GroupQueryAttention nodes. What was found about that operator on the CPU (1.32,
and 1.19, the newest for Python 3.9), and what this session therefore does:

* With S = 1 it takes any number of rows of different lengths: `seqlens_k[b] = past_b` (valid entries after
  the step, minus one) and `total_sequence_length = max(past) + 1`. Rows may be empty.
* With S > 1 behind a past it takes one row only ("batch_size must be 1 ..."), so prompts are prefilled row by
  row: a row is a contiguous slice of the buffer, bound as a [1, K, T, d] cache of its own. Nothing is padded,
  nothing copied.
* Before 1.20, S > 1 silently ignores the past: `can_extend` is False there and prompts go in whole.
* Entries beyond a row's length are neither read nor written. The buffer's length costs no time and, until it
  is used, no memory: the operating system hands out zeroed pages on first touch.
* Rotary positions follow from seqlens_k; `position_ids` and `attention_mask` are fed only if the graph asks
  for them.
* There is no bfloat16 kernel.
"""

import math
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from .errors import SessionError
from .host import available_bytes
from .ort_graph import OrtGraph, view
from .session import UNBOUNDED, Scores


class SharedCacheSession:
    """A `Session` over a graph whose past and present are the same memory."""

    def __init__(self, graph: OrtGraph) -> None:
        self.graph = graph
        self.vocab_size = self.num_candidates = graph.shape.vocab_size
        self.can_extend = graph.can_extend
        self.max_chunk = self.max_capacity = UNBOUNDED
        self.num_slots = 0
        self.capacity = 0
        self._buffers: List[np.ndarray] = []  # one [B, K, T, d] per past input
        self._used: List[int] = []  # entries ever written per row: what a copy must carry
        self._decode_steps: Dict[Tuple[int, int], _BoundStep] = {}

    def reserve(self, num_slots: int, capacity: int) -> None:
        """See Session."""
        num_slots, capacity = max(num_slots, self.num_slots), max(capacity, self.capacity)
        if (num_slots, capacity) == (self.num_slots, self.capacity):
            return
        shape = (num_slots, self.graph.shape.num_key_value_heads, capacity, self.graph.shape.head_dim)
        self._check_memory(shape)
        self._decode_steps.clear()
        try:
            for i in range(len(self.graph.past)):  # one at a time: only one old buffer lives beside the new ones
                self._grow(i, shape)
        except MemoryError:  # buffers of either size hold what they held: the old reservation stands
            raise SessionError(self._memory_message(shape)) from None
        self._used += [0] * (num_slots - self.num_slots)
        self.num_slots, self.capacity = num_slots, capacity

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
        longest = max(past) + s
        if longest > self.capacity or first_slot + n > self.num_slots:
            raise SessionError(
                f"{longest} entries in {first_slot + n} slots, reserved {self.capacity}, {self.num_slots}"
            )
        logits = self._step(first_slot, n, s).run(input_ids, past, longest)
        for slot, length in enumerate(past, first_slot):
            self._used[slot] = max(self._used[slot], length + s)
        return Scores(self.graph.logits_type.to_float32(logits)) if need_scores else None

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """See Session."""
        for buffer in self._buffers:
            buffer[target, :, :length] = buffer[source, :, :length]
        self._used[target] = max(self._used[target], length)

    def swap_slots(self, first: int, second: int, length: int) -> None:
        """See Session."""
        for buffer in self._buffers:
            kept = buffer[first, :, :length].copy()
            buffer[first, :, :length] = buffer[second, :, :length]
            buffer[second, :, :length] = kept
        self._used[first] = max(self._used[first], length)
        self._used[second] = max(self._used[second], length)

    def close(self) -> None:
        """See Session."""
        self._decode_steps.clear()
        self._buffers.clear()
        self.num_slots = self.capacity = 0
        self.graph.session = None

    def _step(self, first_slot: int, n: int, s: int) -> "_BoundStep":
        if s > 1:
            return _BoundStep(self.graph, self._buffers, slice(first_slot, first_slot + n), s)
        key = (first_slot, n)
        if key not in self._decode_steps:
            self._decode_steps[key] = _BoundStep(self.graph, self._buffers, slice(first_slot, first_slot + n), 1)
        return self._decode_steps[key]

    def _grow(self, i: int, shape: Tuple[int, ...]) -> None:
        buffer = np.zeros(shape, self.graph.cache_type.dtype)
        if i == len(self._buffers):
            self._buffers.append(buffer)
            return
        for slot, length in enumerate(self._used):
            buffer[slot, :, :length] = self._buffers[i][slot, :, :length]
        self._buffers[i] = buffer

    def _check_memory(self, shape: Tuple[int, ...]) -> None:
        more = self._size_bytes(shape) - sum(buffer.nbytes for buffer in self._buffers)
        available = available_bytes()
        if available is not None and more > available:
            raise SessionError(f"{self._memory_message(shape)}; {available / 1e9:.2f} GB are free")

    def _memory_message(self, shape: Tuple[int, ...]) -> str:
        return (
            f"no memory for a KV cache of {shape[0]} slots x {shape[2]} tokens "
            f"({self._size_bytes(shape) / 1e9:.2f} GB): lower max_model_len or max_batch_size"
        )

    def _size_bytes(self, shape: Tuple[int, ...]) -> int:
        return len(self.graph.past) * math.prod(shape) * int(self.graph.cache_type.dtype.itemsize)


class _BoundStep:
    """The bound buffers of one call shape: n neighbouring rows, S tokens each."""

    def __init__(self, graph: OrtGraph, cache: List[np.ndarray], rows: slice, s: int) -> None:
        n = rows.stop - rows.start
        self.graph = graph
        self.binding: Any = graph.session.io_binding()
        self.feeds = {
            "input_ids": np.zeros((n, s), np.int64),
            "position_ids": np.zeros((n, s), np.int64),
            "seqlens_k": np.zeros(n, np.int32),
            "total_sequence_length": np.zeros((1,) * graph.input_ranks.get("total_sequence_length", 0), np.int32),
            "last_token_index": np.full(n, s - 1, np.int64),
        }
        for name, feed in self.feeds.items():
            if name in graph.inputs:
                self.binding.bind_input(name, "cpu", 0, feed.dtype.type, list(feed.shape), feed.ctypes.data)
        self._bind_cache(cache, rows)
        self.logits: Optional[np.ndarray] = None
        if "last_token_index" in graph.inputs:
            self.logits = np.empty((n, 1, graph.shape.vocab_size), graph.logits_type.dtype)
            place = (graph.logits_type.binding_type, list(self.logits.shape), self.logits.ctypes.data)
            self.binding.bind_output("logits", "cpu", 0, *place)
        else:
            self.binding.bind_output("logits", "cpu")

    def run(self, input_ids: np.ndarray, past: Sequence[int], total: int) -> np.ndarray:
        """Run one step and return the logits [n, V] behind the last token of every row; `total` is max(past) + S."""
        s = input_ids.shape[1]
        self.feeds["input_ids"][...] = input_ids
        self.feeds["seqlens_k"][...] = [length + s - 1 for length in past]
        self.feeds["total_sequence_length"][...] = total
        if "position_ids" in self.graph.inputs:
            self.feeds["position_ids"][...] = np.asarray(past)[:, None] + np.arange(s)
        if "attention_mask" in self.graph.inputs:
            mask = (np.arange(total)[None, :] < np.asarray(past)[:, None] + s).astype(np.int64)
            self.binding.bind_cpu_input("attention_mask", mask)
        self.graph.run_bound(self.binding)
        if self.logits is not None:
            return self.logits[:, 0]
        value = self.binding.get_outputs()[self._logits_position]
        return view(value, self.graph.logits_type)[:, -1].copy()

    def _bind_cache(self, cache: List[np.ndarray], rows: slice) -> None:
        element_type = self.graph.cache_type.binding_type
        for past, present, buffer in zip(self.graph.past, self.graph.present, cache):
            row = buffer[rows]
            place = (element_type, list(row.shape), row.ctypes.data)
            self.binding.bind_input(past, "cpu", 0, *place)
            self.binding.bind_output(present, "cpu", 0, *place)
        self._logits_position = len(self.graph.past)  # outputs come back in the order they were bound
