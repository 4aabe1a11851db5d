"""Device memory with addresses of its own, and the host memory a program has shown to ACL.

Device addresses mean nothing to the host, and lie far apart, so that an address beyond an allocation belongs to none. They
are not used twice: a freed address stays known as freed. Fresh memory is full of 0xFF, which as floating point is NaN.
"""

from __future__ import annotations

import bisect
import ctypes
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
_FIRST_ADDRESS = 0x12C0_0000_0000
_GUARD_BYTES = 1 << 20
_ALIGNMENT = 512
_POISON = 0xFF
_MAX_SHOWN = 4096


@dataclass
class Allocation:
    """Device memory: where it starts, the size asked for, its bytes (None once freed), and what it is for."""

    start: int
    size_bytes: int
    content: Bytes | None
    purpose: str

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.start + self.size_bytes


class DeviceMemory:
    """All device memory.

    Args:
        capacity_bytes: How much there is.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes, self.used_bytes = capacity_bytes, 0
        self._starts: list[int] = []
        self._allocations: list[Allocation] = []
        self._next = _FIRST_ADDRESS

    def allocate(self, size_bytes: int, purpose: str) -> int | None:
        """Return the address of fresh memory, or None when there is not enough."""
        if self.used_bytes + _taken(size_bytes) > self.capacity_bytes:
            return None
        start = self._next
        self._next += -(-(size_bytes + _GUARD_BYTES) // _ALIGNMENT) * _ALIGNMENT
        self._starts.append(start)
        self._allocations.append(Allocation(start, size_bytes, np.full(size_bytes, _POISON, np.uint8), purpose))
        self.used_bytes += _taken(size_bytes)
        return start

    def find(self, address: int) -> Allocation | None:
        """Return the allocation, live or freed, that an address lies in."""
        index = bisect.bisect_right(self._starts, address) - 1
        if index < 0 or address >= self._allocations[index].end:
            return None
        return self._allocations[index]

    def release(self, allocation: Allocation) -> None:
        """Free it."""
        allocation.content = None
        self.used_bytes -= _taken(allocation.size_bytes)

    def live(self) -> Iterator[Allocation]:
        """Yield what is not freed."""
        return (allocation for allocation in self._allocations if allocation.content is not None)

    def is_device(self, address: int) -> bool:
        """Whether an address is of this memory's kind."""
        return _FIRST_ADDRESS <= address < self._next + _GUARD_BYTES


def _taken(size_bytes: int) -> int:
    return -(-size_bytes // 32) * 32 + 32


@dataclass
class HostRange:
    """Host memory that ACL was shown.

    Attributes:
        start: Its address.
        size_bytes: Its size.
        is_pinned: Whether it came from malloc_host.
        owner: The object that keeps it, or a weak reference to it.
    """

    start: int
    size_bytes: int
    is_pinned: bool
    owner: Any

    @property
    def is_alive(self) -> bool:
        """Whether the object that owned the memory still exists."""
        return not isinstance(self.owner, weakref.ref) or self.owner() is not None


class HostMemory:
    """Host memory by address."""

    def __init__(self) -> None:
        self._ranges: dict[int, HostRange] = {}
        self.freed: set[int] = set()

    def allocate(self, size_bytes: int) -> int:
        """Return the address of pinned memory, aligned and full of 0xFF."""
        block = np.full(size_bytes + 64, _POISON, np.uint8)
        start = -(-block.ctypes.data // 64) * 64
        self._ranges[start] = HostRange(start, size_bytes, True, block)
        self.freed.discard(start)
        return start

    def show(self, start: int, size_bytes: int, owner: Any) -> None:
        """Note memory that belongs to a Python object."""
        if len(self._ranges) > _MAX_SHOWN:
            self._ranges = {key: r for key, r in self._ranges.items() if r.is_pinned or r.is_alive}
        self._ranges[start] = HostRange(start, size_bytes, False, owner)

    def find(self, address: int) -> HostRange | None:
        """Return the range an address lies in."""
        exact = self._ranges.get(address)
        if exact is not None:
            return exact
        return next((r for r in self._ranges.values() if r.start <= address < r.start + r.size_bytes), None)

    def pinned(self) -> list[HostRange]:
        """Return what malloc_host gave and nobody freed."""
        return [r for r in self._ranges.values() if r.is_pinned]

    def release(self, start: int) -> None:
        """Free pinned memory."""
        del self._ranges[start]
        self.freed.add(start)


def host_bytes(address: int, size_bytes: int) -> Bytes:
    """Return host memory as an array; the caller has checked that it exists."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(address))
