"""The KV cache on the device: one allocation, every layer's keys and values a part [slots, K, T, d] of it.

A static graph reads B neighbouring slots of every part in place (past_key_values.* [B, K, T, d]) and returns the new rows
(present.* [B, K, S, d]). All parts lie equally far apart, and so do the new rows of all parts: one two-dimensional copy
appends the rows of one head of one slot for all layers at once, so a decode step takes B * K copies, not 2 * layers * B * K.
"""

from typing import List, Sequence, Tuple

from .acl_device import ALIGNMENT, AclDevice, padded
from .errors import SessionError


class DeviceCache:
    """Room for `num_slots` slots of `kv_len` entries.

    Args:
        device: Where.
        num_parts: Two per layer.
        num_slots: Slots.
        num_heads: kv heads K.
        kv_len: Entries T of every slot.
        entry_bytes: Bytes of one head's entry: d elements.

    Raises:
        SessionError: There is not enough memory, or slots of this size cannot be addressed.
    """

    def __init__(
        self, device: AclDevice, num_parts: int, num_slots: int, num_heads: int, kv_len: int, entry_bytes: int
    ) -> None:
        self.device = device
        self.num_parts, self.num_slots, self.num_heads = num_parts, num_slots, num_heads
        self.kv_len, self.entry_bytes = kv_len, entry_bytes
        self.head_bytes = kv_len * entry_bytes
        self.slot_bytes = num_heads * self.head_bytes
        if self.slot_bytes % ALIGNMENT:
            raise SessionError(
                f"a slot of {kv_len} tokens takes {self.slot_bytes} bytes in each layer, no multiple of {ALIGNMENT}; "
                "compile with a --kv-len that is a multiple of 32"
            )
        self.pitch = padded(num_slots * self.slot_bytes)
        size_bytes = num_parts * self.pitch
        self.address = device.malloc(size_bytes, f"a KV cache of {num_slots} slots x {kv_len} tokens")
        try:
            device.zero(self.address, size_bytes)
        except BaseException:
            self.free()
            raise

    def free(self) -> None:
        """Give the memory back."""
        self.device.free(self.address)

    def part(self, index: int, first_slot: int) -> int:
        """Return where a graph finds part `index` of the slots from `first_slot` on."""
        return self.address + index * self.pitch + first_slot * self.slot_bytes

    def append(self, slot: int, past: int, num_tokens: int, rows: int, pitch: int, query_len: int) -> None:
        """Put new rows of one slot behind its `past` entries, on the stream.

        Args:
            slot: The slot.
            past: Entries it has.
            num_tokens: How many of the new rows are tokens; the others are padding.
            rows: Address of the slot's new rows [K, S, d] of part 0.
            pitch: Distance of the same rows of the next part.
            query_len: S.
        """
        width = num_tokens * self.entry_bytes
        target = self.part(0, slot) + past * self.entry_bytes
        for head in range(self.num_heads):
            source = rows + head * query_len * self.entry_bytes
            self.device.copy_rows(target + head * self.head_bytes, self.pitch, source, pitch, width, self.num_parts)

    def copy_slot(self, source: int, target: int, length: int, other: "DeviceCache") -> None:
        """Copy the first entries of a slot of this cache to a slot of another cache (or this one), on the stream."""
        width = length * self.entry_bytes
        for head in range(self.num_heads):
            start = self.part(0, source) + head * self.head_bytes
            end = other.part(0, target) + head * other.head_bytes
            self.device.copy_rows(end, other.pitch, start, self.pitch, width, self.num_parts)

    def swap_slots(self, first: int, second: int, length: int) -> None:
        """Exchange the first entries of two slots, through a slot of memory taken for it; waits."""
        spare = DeviceCache(self.device, self.num_parts, 1, self.num_heads, self.kv_len, self.entry_bytes)
        try:
            self.copy_slot(first, 0, length, spare)
            self.copy_slot(second, first, length, self)
            spare.copy_slot(0, second, length, self)
            self.device.synchronize()
        except BaseException:
            self.device.drain()
            raise
        finally:
            spare.free()


def parts_of(inputs: Sequence[str]) -> Tuple[List[str], List[str]]:
    """Return the names of a graph's cache inputs, in order, and of the outputs with their new rows."""
    past = [name for name in inputs if name.startswith("past_key_values.")]
    return past, [name.replace("past_key_values.", "present.", 1) for name in past]
