"""`acl.rt`: devices, contexts, streams, memory and copies, with pyACL's signatures and return conventions."""

from __future__ import annotations

from typing import Any

from qcompile.ascend.sim.copies import Copier
from qcompile.ascend.sim.machine import (
    INVALID_PARAM,
    NOT_CLEARED,
    OUT_OF_MEMORY,
    RT_CONTEXT_NULL,
    RT_DEVICE,
    RT_PARAM,
    UNINITIALIZED,
    Machine,
)
from qcompile.ascend.sim.memory import Allocation
from qcompile.ascend.sim.streams import Context, Stream

_HBM = 1


class RuntimeCalls:
    """The functions; names as in pyACL."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._copier = Copier(machine)
        self._default: Context | None = None

    # devices, contexts, streams

    def get_device_count(self) -> tuple[int, int]:
        return 1, 0

    def set_device(self, device_id: int) -> int:
        machine = self._machine
        if not machine.is_initialized:
            return machine.misuse("not-initialized", "set_device", UNINITIALIZED, "acl.init was not called")
        if device_id != 0:
            return machine.misuse("no-such-device", "set_device", RT_DEVICE, f"device {device_id!r}; there is only 0")
        machine.users_of_device += 1
        if self._default is None:
            self._default = Context(is_default=True)
        machine.context = self._default
        return 0

    def reset_device(self, device_id: int) -> int:
        machine = self._machine
        if device_id != 0 or machine.users_of_device == 0:
            return machine.misuse("no-such-device", "reset_device", RT_DEVICE, f"device {device_id!r} was not set")
        machine.users_of_device -= 1
        if machine.users_of_device:
            return 0
        self._default, machine.context = None, None
        return self._left_over("reset_device")

    def create_context(self, device_id: int) -> tuple[int, int]:
        if self._machine.users_of_device == 0 or device_id != 0:
            code = self._machine.misuse(
                "no-such-device", "create_context", RT_DEVICE, f"device {device_id!r} is not set"
            )
            return 0, code
        context = Context()
        self._machine.context = context
        return self._machine.handles.add(context), 0

    def destroy_context(self, handle: int) -> int:
        machine = self._machine
        context = machine.handles.get(handle, Context)
        if context is None:
            return machine.misuse("unknown-context", "destroy_context", RT_PARAM, "no context, or destroyed before")
        context.is_alive = False
        machine.handles.pop(handle)
        streams = [h for h, stream in machine.handles.of(Stream) if stream.context is context]
        if streams:
            return machine.misuse(
                "context-with-streams", "destroy_context", NOT_CLEARED, f"{len(streams)} streams of it are left"
            )
        return 0

    def set_context(self, handle: int) -> int:
        context = self._machine.handles.get(handle, Context)
        if context is None:
            return self._machine.misuse("unknown-context", "set_context", RT_PARAM, "no context, or a destroyed one")
        self._machine.context = context
        return 0

    def get_context(self) -> tuple[int, int]:
        current = self._machine.context
        for handle, context in self._machine.handles.of(Context):
            if context is current:
                return handle, 0
        return 0, self._machine.error(RT_CONTEXT_NULL, "no context of this thread")

    def create_stream(self) -> tuple[int, int]:
        code = self._machine.require_context("create_stream")
        context = self._machine.context
        if code or context is None:
            return 0, code
        return self._machine.handles.add(Stream(context)), 0

    def destroy_stream(self, handle: int) -> int:
        machine = self._machine
        stream = machine.handles.get(handle, Stream)
        if stream is None:
            return machine.misuse("unknown-stream", "destroy_stream", RT_PARAM, "no stream, or destroyed before")
        if stream.tasks:
            machine.misuse(
                "stream-with-work", "destroy_stream", 0, f"{len(stream.tasks)} pieces of work are unfinished"
            )
            stream.wait()
        machine.handles.pop(handle)
        return 0

    def synchronize_stream(self, handle: int) -> int:
        stream, code = self._machine.stream(handle, "synchronize_stream")
        return code if stream is None else stream.wait()

    def synchronize_device(self) -> int:
        code = self._machine.require_context("synchronize_device")
        codes = [stream.wait() for stream in self._machine.pending()] if not code else [code]
        return next((found for found in codes if found), 0)

    # memory

    def malloc(self, size: int, policy: int) -> tuple[int, int]:
        machine = self._machine
        code = machine.require_context("malloc")
        if not code and (not isinstance(size, int) or size <= 0):
            code = machine.misuse("malloc-of-nothing", "malloc", INVALID_PARAM, f"size {size!r}")
        if not code and policy not in range(8):
            code = machine.misuse("bad-policy", "malloc", INVALID_PARAM, f"policy {policy!r}")
        if code:
            return 0, code
        address = machine.device.allocate(size, "malloc")
        if address is None:
            free = machine.device.capacity_bytes - machine.device.used_bytes
            return 0, machine.error(OUT_OF_MEMORY, f"malloc of {size} bytes, {free} are free")
        return address, 0

    def free(self, address: int) -> int:
        machine = self._machine
        code = machine.require_context("free")
        allocation = machine.device.find(address) if isinstance(address, int) else None
        if code:
            return code
        if allocation is None:
            kind = "free-of-host-memory" if machine.host.find(address) is not None else "free-of-unknown"
            return machine.misuse(kind, "free", RT_PARAM, f"{address:#x} is no device memory")
        problem = self._why_not_free(allocation, address)
        if problem:
            return machine.misuse(problem[0], "free", RT_PARAM, problem[1])
        machine.device.release(allocation)
        return 0

    def _why_not_free(self, allocation: Allocation, address: int) -> tuple[str, str] | None:
        if allocation.content is None:
            return "double-free", f"{address:#x} was freed before"
        if address != allocation.start:
            return "free-inside", f"{address:#x} lies {address - allocation.start} bytes within an allocation"
        if allocation.purpose != "malloc":
            return "free-of-model-memory", f"{address:#x} belongs to a loaded model"
        user = self._machine.touching(allocation.start, allocation.size_bytes)
        if user:
            return "free-in-use", f"{address:#x} is used by {user}, which was not waited for"
        return None

    def malloc_host(self, size: int) -> tuple[int, int]:
        machine = self._machine
        code = machine.require_context("malloc_host")
        if not code and (not isinstance(size, int) or size <= 0):
            code = machine.misuse("malloc-of-nothing", "malloc_host", INVALID_PARAM, f"size {size!r}")
        return (0, code) if code else (machine.host.allocate(size), 0)

    def free_host(self, address: int) -> int:
        machine = self._machine
        found = machine.host.find(address)
        if found is not None and found.is_pinned and found.start == address:
            user = machine.touching(address, found.size_bytes)
            if user:
                return machine.misuse("free-in-use", "free_host", RT_PARAM, f"{address:#x} is used by {user}")
            machine.host.release(address)
            return 0
        if address in machine.host.freed:
            return machine.misuse("double-free", "free_host", RT_PARAM, f"{address:#x} was freed before")
        kind = "free-host-of-device-memory" if machine.device.is_device(address) else "free-of-unknown"
        return machine.misuse(kind, "free_host", RT_PARAM, f"{address:#x} is not from malloc_host")

    def get_mem_info(self, attribute: int) -> tuple[int, int, int]:
        device = self._machine.device
        code = self._machine.require_context("get_mem_info")
        if attribute != _HBM and not code:
            code = self._machine.error(INVALID_PARAM, f"attribute {attribute!r}; 1 is HBM")
        return device.capacity_bytes - device.used_bytes, device.capacity_bytes, code

    def get_run_mode(self) -> tuple[int, int]:
        return 1, 0

    # copies

    def memcpy(self, target: int, target_max: int, source: int, count: int, kind: int) -> int:
        return self._copier.copy("memcpy", target, target_max, source, count, kind)

    def memcpy_async(self, target: int, target_max: int, source: int, count: int, kind: int, stream: int) -> int:
        return self._copier.copy("memcpy_async", target, target_max, source, count, kind, stream)

    def memcpy2d_async(self, *arguments: Any) -> int:
        return self._copier.copy_rows(*arguments)

    def memset(self, address: int, maximum: int, value: int, count: int) -> int:
        return self._copier.fill(address, maximum, value, count)

    def _left_over(self, call: str) -> int:
        """Report what was not released: the device goes, and with it whatever is on it."""
        machine = self._machine
        left = list(machine.device.live())
        if left:
            total = sum(allocation.size_bytes for allocation in left)
            machine.misuse("device-leak", call, NOT_CLEARED, f"{total} bytes in {len(left)} allocations were not freed")
        if machine.host.pinned():
            machine.misuse("host-leak", call, NOT_CLEARED, f"{len(machine.host.pinned())} from malloc_host are left")
        for kind, name in ((Stream, "stream"), (Context, "context")):
            found = machine.handles.of(kind)
            if found:
                machine.misuse(f"{name}-leak", call, NOT_CLEARED, f"{len(found)} were not destroyed")
        return NOT_CLEARED if left else 0
