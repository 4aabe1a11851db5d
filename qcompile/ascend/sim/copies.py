"""Copies between host and device: both ends are checked against what kind of memory they claim to be."""

from __future__ import annotations

from qcompile.ascend.sim.machine import INVALID_PARAM, NOT_SUPPORTED, RT_PARAM, RT_UNALIGNED, Machine
from qcompile.ascend.sim.memory import Bytes, host_bytes
from qcompile.ascend.sim.streams import Task

_HOST, _DEVICE = "host", "device"
# kind -> source, target
_KINDS = {0: (_HOST, _HOST), 1: (_HOST, _DEVICE), 2: (_DEVICE, _HOST), 3: (_DEVICE, _DEVICE)}
_TRAFFIC = {1: "host_to_device", 2: "device_to_host", 3: "device_to_device"}
_ALIGNMENT = 64
_MAX_WIDTH, _MAX_HEIGHT = 5_000_000, 5 << 20


class Copier:
    """Does copies, at once or on a stream, and counts their bytes.

    Args:
        machine: Whose memory.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def copy(
        self,
        call: str,
        target: int,
        target_max: int,
        source: int,
        count: int,
        kind: int,
        stream_handle: int | None = None,
    ) -> int:
        """Copy `count` bytes; with a stream when somebody waits for it."""
        code = self._check(call, target, target_max, source, count, kind)
        if code or stream_handle is None:
            return code or self._move(call, target, source, count, kind)
        stream, code = self.machine.stream(stream_handle, call)
        if stream is None:
            return code
        code = self._check_async(call, target, source, kind)
        if code:
            return code
        ranges = [(target, target + count), (source, source + count)]
        stream.put(Task(call, lambda: self._move(call, target, source, count, kind), ranges))
        return 0

    def copy_rows(
        self,
        target: int,
        target_pitch: int,
        source: int,
        source_pitch: int,
        width: int,
        height: int,
        kind: int,
        stream_handle: int,
    ) -> int:
        """Copy rows on a stream."""
        call, machine = "memcpy2d_async", self.machine
        if kind not in (1, 2) and not (kind == 3 and machine.release.copies_rows):
            return machine.error(NOT_SUPPORTED, f"{call}: kind {kind} is not supported by this release")
        stream, code = machine.stream(stream_handle, call)
        if stream is None:
            return code
        if not 0 < width <= min(_MAX_WIDTH, target_pitch, source_pitch) or not 0 < height <= _MAX_HEIGHT:
            return machine.misuse("bad-copy-size", call, INVALID_PARAM, f"{height} rows of {width} bytes")
        spans = [(height - 1) * pitch + width for pitch in (target_pitch, source_pitch)]
        for address, span, where in zip((target, source), spans, reversed(_KINDS[kind]), strict=True):
            code = self._check_range(call, address, span, where)
            if code:
                return code

        def move() -> int:
            for row in range(height):
                code = self._move(
                    call, target + row * target_pitch, source + row * source_pitch, width, kind, calls=row == 0
                )
                if code:
                    return code
            return 0

        ranges = [(target, target + spans[0]), (source, source + spans[1])]
        stream.put(Task(call, move, ranges))
        return 0

    def fill(self, address: int, maximum: int, value: int, count: int) -> int:
        """Set bytes of the device."""
        machine = self.machine
        code = machine.require_context("memset")
        if not code and not 0 < count <= maximum:
            code = machine.misuse("bad-copy-size", "memset", INVALID_PARAM, f"{count} bytes into {maximum}")
        code = code or self._check_range("memset", address, count, _DEVICE)
        if not code:
            self.bytes_at(address, count, _DEVICE)[:] = value
        return code

    def bytes_at(self, address: int, size_bytes: int, where: str) -> Bytes:
        """Return memory that was checked."""
        if where == _HOST:
            return host_bytes(address, size_bytes)
        allocation = self.machine.device.find(address)
        assert allocation is not None
        assert allocation.content is not None
        start = address - allocation.start
        return allocation.content[start : start + size_bytes]

    def _check(self, call: str, target: int, target_max: int, source: int, count: int, kind: int) -> int:
        machine = self.machine
        code = machine.require_context(call)
        if code:
            return code
        if kind not in _KINDS:
            return machine.misuse("bad-copy-kind", call, INVALID_PARAM, f"kind {kind!r}")
        if not isinstance(count, int) or not 0 < count <= target_max:
            return machine.misuse("bad-copy-size", call, INVALID_PARAM, f"{count!r} bytes into {target_max!r}")
        from_where, to_where = _KINDS[kind]
        return self._check_range(call, source, count, from_where) or self._check_range(call, target, count, to_where)

    def _check_range(self, call: str, address: int, size_bytes: int, where: str) -> int:
        return (
            self.check_device(call, address, size_bytes)
            if where == _DEVICE
            else self._check_host(call, address, size_bytes)
        )

    def check_device(self, call: str, address: int, size_bytes: int) -> int:
        """Return 0 when these bytes are live device memory."""
        machine = self.machine
        if not isinstance(address, int) or address == 0:
            return machine.misuse("null-pointer", call, RT_PARAM, f"{address!r} where device memory is wanted")
        allocation = machine.device.find(address)
        if allocation is None:
            is_host = machine.host.find(address) is not None or not machine.device.is_device(address)
            kind = "host-pointer-as-device" if is_host else "wild-device-pointer"
            return machine.misuse(kind, call, RT_PARAM, f"{address:#x} is no device memory")
        if allocation.content is None:
            return machine.misuse("use-after-free", call, RT_PARAM, f"{address:#x} was freed")
        if address + size_bytes > allocation.end:
            beyond = address + size_bytes - allocation.end
            return machine.misuse("device-overrun", call, RT_PARAM, f"{beyond} bytes beyond {allocation.size_bytes}")
        return 0

    def _check_host(self, call: str, address: int, size_bytes: int) -> int:
        machine = self.machine
        if isinstance(address, int) and machine.device.is_device(address):
            return machine.misuse("device-pointer-as-host", call, RT_PARAM, f"{address:#x} is device memory")
        found = machine.host.find(address) if isinstance(address, int) else None
        if found is None:
            known = address in machine.host.freed
            kind = "use-after-free" if known else "unknown-host-pointer"
            return machine.misuse(kind, call, RT_PARAM, f"{address!r} is from neither malloc_host nor acl.util")
        if not found.is_alive:
            return machine.misuse("dead-host-array", call, RT_PARAM, "the array behind this pointer is gone; keep it")
        if address + size_bytes > found.start + found.size_bytes:
            beyond = address + size_bytes - found.start - found.size_bytes
            return machine.misuse("host-overrun", call, RT_PARAM, f"{beyond} bytes beyond {found.size_bytes}")
        return 0

    def _check_async(self, call: str, target: int, source: int, kind: int) -> int:
        machine = self.machine
        if kind == 0:
            return machine.misuse("bad-copy-kind", call, NOT_SUPPORTED, "host to host cannot be asynchronous")
        if target % _ALIGNMENT or source % _ALIGNMENT:
            return machine.misuse("unaligned", call, RT_UNALIGNED, f"{source:#x} to {target:#x}; 64 bytes are wanted")
        for address, where in zip((source, target), _KINDS[kind], strict=True):
            found = machine.host.find(address) if where == _HOST else None
            if found is not None and not found.is_pinned:
                machine.misuse("pageable-memory", call, 0, "undefined before CANN 8.5; take malloc_host")
        return 0

    def _move(self, call: str, target: int, source: int, count: int, kind: int, *, calls: bool = True) -> int:
        """Copy now; what was freed since the work was put on the stream is found here."""
        from_where, to_where = _KINDS[kind]
        code = self._check_range(call, source, count, from_where) or self._check_range(call, target, count, to_where)
        if code:
            return code
        self.bytes_at(target, count, to_where)[:] = self.bytes_at(source, count, from_where)
        if kind in _TRAFFIC:
            self.machine.traffic[f"{_TRAFFIC[kind]}_bytes"] += count
            self.machine.traffic[f"{_TRAFFIC[kind]}_copies"] += calls
        return 0
