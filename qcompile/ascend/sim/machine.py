"""The simulated machine: handles, what is current in which thread, and a report of every misuse.

Codes are those of CANN's headers. A call that CANN would refuse is refused with its code, and is a report where the
program is at fault; what CANN would let pass and a device would punish later (a stale pointer, a leak) is a report too.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qcompile.ascend.sim.memory import DeviceMemory, HostMemory
from qcompile.ascend.sim.streams import Context, Stream

INVALID_PARAM, UNINITIALIZED, REPEAT_INITIALIZE, REPEAT_FINALIZE, NOT_CLEARED = 100000, 100001, 100002, 100037, 148051
RT_PARAM, RT_DEVICE, RT_CONTEXT_NULL, RT_STREAM_CONTEXT, RT_UNALIGNED = 107000, 107001, 107002, 107003, 107008
NOT_SUPPORTED, OUT_OF_MEMORY, KERNEL_FAILED = 207000, 207001, 507015
GE_PARAM, GE_PATH, GE_MODEL_ID, GE_DATA_SIZE, GE_DIMS, GE_GEAR = 145000, 145002, 145003, 145006, 145012, 145013
GE_LOAD = 545001
INPUT_MISMATCH, OUTPUT_MISMATCH, NOT_DYNAMIC = 100017, 100018, 100019


@dataclass(frozen=True)
class Misuse:
    """One mistake of the program.

    Attributes:
        kind: What kind, such as ``double-free``.
        call: The function it happened in.
        code: What the function returned.
        message: What was seen.
    """

    kind: str
    call: str
    code: int
    message: str


@dataclass(frozen=True)
class Release:
    """What the simulated CANN can do that an older one cannot.

    Attributes:
        copies_rows: `memcpy2d_async` within the device.
        shares_weights: `set_external_weight_address`.
    """

    copies_rows: bool = True
    shares_weights: bool = True


class Handles:
    """Numbers that stand for objects, as ACL's pointers do."""

    def __init__(self) -> None:
        self._objects: dict[int, Any] = {}
        self._next = 0x5500_0000_1000

    def add(self, thing: Any) -> int:
        """Return a new number for a thing."""
        self._next += 0x40
        self._objects[self._next] = thing
        return self._next

    def get(self, handle: object, kind: type[Any]) -> Any:
        """Return the thing of that kind, or None."""
        thing = self._objects.get(handle) if isinstance(handle, int) else None
        return thing if isinstance(thing, kind) else None

    def pop(self, handle: int) -> None:
        """Forget a thing."""
        del self._objects[handle]

    def of(self, kind: type[Any]) -> list[tuple[int, Any]]:
        """Return everything of a kind."""
        return [(handle, thing) for handle, thing in self._objects.items() if isinstance(thing, kind)]


class Machine:
    """One device with its host.

    Args:
        soc_name: The chip it claims to be.
        memory_bytes: Device memory.
        release: What its CANN can do.
    """

    def __init__(self, soc_name: str, memory_bytes: int, release: Release) -> None:
        self.soc_name, self.release = soc_name, release
        self.device, self.host = DeviceMemory(memory_bytes), HostMemory()
        self.handles = Handles()
        self.reports: list[Misuse] = []
        self.traffic: Counter[str] = Counter()
        self.runs: Counter[str] = Counter()  # by file
        self.is_initialized = self.is_finalized = False
        self.users_of_device = 0  # set_device less reset_device
        self._thread = threading.local()
        self.lock = threading.RLock()

    # what is wrong

    def misuse(self, kind: str, call: str, code: int, message: str) -> int:
        """Record a mistake of the program and return the code."""
        self.reports.append(Misuse(kind, call, code, message))
        return self.error(code, f"{call}: {message}")

    def error(self, code: int, message: str) -> int:
        """Note a message for `get_recent_err_msg` and return the code."""
        self._thread.message = message
        return code

    def take_message(self) -> str:
        """Return the last message of this thread; reading clears it."""
        message, self._thread.message = getattr(self._thread, "message", ""), ""
        return message

    def record(self) -> dict[str, Any]:
        """Return what was moved, what is left on the device, and every misuse, JSON-ready."""
        left = sum(allocation.size_bytes for allocation in self.device.live())
        return {
            "traffic": dict(self.traffic),
            "runs": dict(self.runs),
            "leaked_device_bytes": left,
            "misuse": [vars(report) for report in self.reports],
        }

    # what is current

    @property
    def context(self) -> Context | None:
        """The context current in this thread."""
        return getattr(self._thread, "context", None)

    @context.setter
    def context(self, context: Context | None) -> None:
        self._thread.context = context

    def require_context(self, call: str) -> int:
        """Return 0 where a live context is current in this thread."""
        if not self.is_initialized:
            return self.misuse("not-initialized", call, UNINITIALIZED, "acl.init was not called, or finalize was")
        if self.context is None:
            return self.misuse(
                "no-context", call, RT_CONTEXT_NULL, "no context in this thread; call acl.rt.set_context"
            )
        if not self.context.is_alive:
            return self.misuse("dead-context", call, RT_CONTEXT_NULL, "this thread's context was destroyed")
        return 0

    def stream(self, handle: object, call: str) -> tuple[Stream | None, int]:
        """Return a live stream of the current context."""
        code = self.require_context(call)
        if code:
            return None, code
        stream = self.handles.get(handle, Stream)
        if stream is None:
            return None, self.misuse("unknown-stream", call, RT_PARAM, f"{handle!r} is no stream, or a destroyed one")
        if stream.context is not self.context:
            return None, self.misuse("foreign-stream", call, RT_STREAM_CONTEXT, "the stream is of another context")
        return stream, 0

    def destroy(self, handle: int, kind: type[Any], call: str) -> int:
        """Forget a thing that a handle of this kind stands for."""
        if self.handles.get(handle, kind) is None:
            return self.misuse("destroyed-twice", call, INVALID_PARAM, "no such handle, or destroyed before")
        self.handles.pop(handle)
        return 0

    def pending(self) -> list[Stream]:
        """Return the streams that hold work."""
        return [stream for _, stream in self.handles.of(Stream) if stream.tasks]

    def touching(self, address: int, size_bytes: int) -> str:
        """Return what unfinished work uses some of these bytes, or ""."""
        for stream in self.pending():
            for task in stream.tasks:
                if any(start < address + size_bytes and address < end for start, end in task.ranges):
                    return task.name
        return ""


def guarded(machine: Machine, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with calls from several threads one after another."""

    def call(*arguments: Any) -> Any:
        with machine.lock:
            return function(*arguments)

    call.__name__, call.__doc__ = function.__name__, function.__doc__
    return call
