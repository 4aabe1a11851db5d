"""One step of one loaded graph: what goes in and comes out, packed so that each way is one copy.

    inputs   input_ids | past_lengths | last_token_index
    outputs  next_token | top_logits | top_ids | logits | present.* of every layer, equally far apart

A greedy step copies the front of the outputs only: the chosen token and, where it is small, the score that shows whether
the graph overflowed.
"""

from dataclasses import dataclass
from typing import Dict, Optional, Sequence, Tuple

import numpy as np

from .acl_cache import DeviceCache, parts_of
from .acl_device import DEVICE_TO_HOST, HOST_TO_DEVICE, HostBuffer, padded, segments
from .acl_model import AclModel
from .errors import SessionError

_INPUTS = ("input_ids", "past_lengths", "last_token_index")
_OUTPUTS = ("next_token", "top_logits", "top_ids", "logits")
_GREEDY_BYTES = 768  # what a greedy step may copy back
Candidates = Tuple[np.ndarray, Optional[np.ndarray]]


@dataclass(frozen=True)
class StepBuffers:
    """Where the packed inputs and outputs are on the device, and the pinned memory they are copied from and to."""

    inputs: int
    outputs: int
    to_device: HostBuffer
    to_host: HostBuffer


class ModelStep:
    """The layout of one model's inputs and outputs, and a step with them.

    Args:
        model: The loaded graph.

    Raises:
        SessionError: It has inputs or outputs that this runtime does not know.
    """

    def __init__(self, model: AclModel) -> None:
        self.model = model
        self._bound_to: Optional[Tuple[int, DeviceCache]] = None  # first slot, cache
        self.past, self.present = parts_of(model.entry.io.inputs)
        self.small_inputs = [name for name in _INPUTS if name in model.ports]
        self.small_outputs = [name for name in _OUTPUTS if name in model.ports]
        self._check_names()
        self._check_sizes()
        ports = model.ports
        starts, self.input_bytes = segments([ports[name].size_bytes for name in self.small_inputs])
        self._at: Dict[str, int] = dict(zip(self.small_inputs, starts))
        starts, self.host_bytes = segments([ports[name].size_bytes for name in self.small_outputs])
        self._at.update(zip(self.small_outputs, starts))
        self.pitch = padded(ports[self.present[0]].size_bytes)
        self.output_bytes = self.host_bytes + len(self.present) * self.pitch

    @property
    def num_candidates(self) -> int:
        """Tokens that a row of scores has at most."""
        names = [name for name in ("logits", "top_logits") if name in self.model.ports]
        return self.model.ports[names[0]].size // self.model.batch if names else 1

    def entry_bytes(self, num_heads: int) -> int:
        """Bytes of one head's entry in the cache."""
        return self.model.ports[self.past[0]].size_bytes // (self.model.batch * num_heads * self.model.kv_len)

    def run(
        self,
        slots: range,
        input_ids: np.ndarray,
        past: Sequence[int],
        cache: DeviceCache,
        buffers: StepBuffers,
        wanted: Sequence[str],
    ) -> Optional[Candidates]:
        """Run one step and append what it adds to the cache.

        Args:
            slots: Neighbouring slots, at most the graph's batch.
            input_ids: int64 [n, S'], S' at most the graph's.
            past: Entries of each slot.
            cache: The cache.
            buffers: Packed inputs and outputs.
            wanted: Outputs to bring to the host: a front part of `small_outputs`, or nothing.

        Returns:
            Scores float32 [n, C] and token ids int64 [n, C] (None when column c is token c), or None.
        """
        model, device = self.model, self.model.device
        first = min(slots.start, cache.num_slots - model.batch)
        row = slots.start - first
        try:
            self._feed(row, input_ids, past, buffers.to_device)
            device.copy(buffers.inputs, buffers.to_device.address, self.input_bytes, HOST_TO_DEVICE)
            self._bind(first, cache, buffers)
            model.enqueue()
            self._append(slots, row, input_ids.shape[1], past, cache, buffers)
            if wanted:
                end = self._at[wanted[-1]] + model.ports[wanted[-1]].size_bytes
                device.copy(buffers.to_host.address, buffers.outputs, end, DEVICE_TO_HOST)
            device.synchronize()
        except BaseException:
            device.drain()
            raise
        return self._candidates(slice(row, row + len(slots)), buffers.to_host, wanted) if wanted else None

    def outputs_for(self, greedy_only: bool) -> Sequence[str]:
        """Return which outputs a caller needs: the token alone, whole rows where there are any, else the candidates."""
        if not greedy_only:
            return self.small_outputs
        score = self.small_outputs[1:2]
        if (
            score == ["top_logits"]
            and self._at["top_logits"] + self.model.ports["top_logits"].size_bytes <= _GREEDY_BYTES
        ):
            return self.small_outputs[:2]
        return self.small_outputs[:1]

    def _feed(self, row: int, input_ids: np.ndarray, past: Sequence[int], host: HostBuffer) -> None:
        n, s = input_ids.shape
        batch, query_len = self.model.batch, self.model.query_len
        host.bytes[: self.input_bytes] = 0  # rows that are not used: token 0 behind nothing
        ids = host.view(self._at["input_ids"], np.int64, batch * query_len).reshape(batch, query_len)
        ids[row : row + n, :s] = input_ids
        host.view(self._at["past_lengths"], np.int32, batch)[row : row + n] = past
        if "last_token_index" in self._at:
            host.view(self._at["last_token_index"], np.int32, 1)[0] = s - 1

    def _bind(self, first: int, cache: DeviceCache, buffers: StepBuffers) -> None:
        """Let the graph read from these slots on; nothing is done while they stay the same."""
        if self._bound_to is not None and self._bound_to[0] == first and self._bound_to[1] is cache:
            return
        self._bound_to = None
        self.model.bind(self._addresses(first, cache, buffers))
        self._bound_to = first, cache

    def _addresses(self, first: int, cache: DeviceCache, buffers: StepBuffers) -> Dict[str, int]:
        found = {name: buffers.inputs + self._at[name] for name in self.small_inputs}
        found.update((name, buffers.outputs + self._at[name]) for name in self.small_outputs)
        for part, (past, present) in enumerate(zip(self.past, self.present)):
            found[past] = cache.part(part, first)
            found[present] = buffers.outputs + self.host_bytes + part * self.pitch
        return found

    def _append(
        self, slots: range, row: int, num_tokens: int, past: Sequence[int], cache: DeviceCache, buffers: StepBuffers
    ) -> None:
        row_bytes = self.model.ports[self.present[0]].size_bytes // self.model.batch
        for index, slot in enumerate(slots):
            rows = buffers.outputs + self.host_bytes + (row + index) * row_bytes
            cache.append(slot, int(past[index]), num_tokens, rows, self.pitch, self.model.query_len)

    def _candidates(self, rows: slice, host: HostBuffer, wanted: Sequence[str]) -> Candidates:
        if "logits" in wanted:
            return self._output("logits", host)[rows], None
        if "top_ids" in wanted:
            return self._output("top_logits", host)[rows], self._output("top_ids", host)[rows]
        ids = self._output("next_token", host)[rows]
        if "top_logits" in wanted:
            return self._output("top_logits", host)[rows, :1], ids
        return np.zeros(ids.shape, np.float32), ids

    def _output(self, name: str, host: HostBuffer) -> np.ndarray:
        port = self.model.ports[name]
        raw = host.bytes[self._at[name] : self._at[name] + port.size_bytes]
        return port.array(raw).reshape(self.model.batch, -1).copy()

    def _check_names(self) -> None:
        model = self.model
        known = {*self.past, *self.present, *self.small_inputs, *self.small_outputs}
        unknown = sorted(set(model.ports) - known)
        missing = [
            name for name in ("input_ids", "past_lengths", "next_token", *self.present) if name not in model.ports
        ]
        if unknown or missing or not self.past:
            odd = f"'{unknown[0]}' is unknown" if unknown else f"'{(missing or ['past_key_values.*'])[0]}' is missing"
            raise SessionError(f"{model.path}: {odd} among its inputs and outputs; update qcompile or compile it again")

    def _check_sizes(self) -> None:
        """What the bytes must be for what the manifest says of batch, tokens and cache length."""
        model = self.model
        ports, b, s, t = model.ports, model.batch, model.query_len, model.kv_len
        past, present = ports[self.past[0]].size_bytes, ports[self.present[0]].size_bytes
        odd = [name for name in self.past if ports[name].size_bytes != past]
        odd += [name for name in self.present if ports[name].size_bytes != present]
        wanted = {"input_ids": 8 * b * s, "past_lengths": 4 * b, "last_token_index": 4, "next_token": 8 * b}
        odd += [name for name, size in wanted.items() if name in ports and ports[name].size_bytes != size]
        if odd or past * s != present * t:
            name = (odd or [self.past[0]])[0]
            raise SessionError(
                f"{model.path}: '{name}' has {ports[name].size_bytes} bytes, which does not fit {b} slots, {s} tokens and a "
                f"cache of {t} that the manifest says; compile the model again"
            )
