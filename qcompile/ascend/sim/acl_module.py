"""A stand-in for the Python module `acl` over a simulated device, put in its place only where somebody asks for it.

with simulated_acl("Ascend910B4") as machine:
...  # `import acl` gives the stand-in here
assert machine.reports == []
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.ascend.chips import cann_version, chip_named
from qcompile.ascend.sim.datasets import DataBuffer
from qcompile.ascend.sim.description_calls import DescriptionCalls
from qcompile.ascend.sim.execution import Workshop
from qcompile.ascend.sim.loaded import LoadedModels
from qcompile.ascend.sim.loading_calls import LoadingCalls
from qcompile.ascend.sim.machine import (
    INVALID_PARAM,
    NOT_CLEARED,
    REPEAT_FINALIZE,
    REPEAT_INITIALIZE,
    UNINITIALIZED,
    Machine,
    Release,
    guarded,
)
from qcompile.ascend.sim.memory import host_bytes
from qcompile.ascend.sim.run_calls import RunCalls
from qcompile.ascend.sim.runtime_calls import RuntimeCalls
from qcompile.runtime.acl_process import finalize_acl

_NUMPY_TYPES = {1: np.int8, 2: np.uint8, 5: np.int32, 7: np.int64, 11: np.float32, 23: np.float16}


def release_of(cann: str) -> Release:
    """Return what a CANN release can do: 8.1 neither copies rows within the device nor shares weights; 8.5 does."""
    is_new = cann_version(cann) >= cann_version("8.5")
    return Release(copies_rows=is_new, shares_weights=is_new)


class TopCalls:
    """The functions of `acl` itself."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def init(self, config_path: str = "") -> int:
        """Initialize; once in a process."""
        del config_path
        machine = self._machine
        if machine.is_initialized:
            return machine.misuse("repeated-init", "init", REPEAT_INITIALIZE, "acl.init was called before")
        machine.is_initialized = True
        return 0

    def finalize(self) -> int:
        """Finalize; reports what is left."""
        machine = self._machine
        if machine.is_finalized:
            return machine.misuse("repeated-finalize", "finalize", REPEAT_FINALIZE, "acl.finalize was called before")
        if not machine.is_initialized:
            return machine.misuse("not-initialized", "finalize", UNINITIALIZED, "acl.init was not called")
        machine.is_initialized, machine.is_finalized = False, True
        left = list(machine.device.live())
        if left:
            total = sum(allocation.size_bytes for allocation in left)
            return machine.misuse("device-leak", "finalize", NOT_CLEARED, f"{total} bytes on the device were not freed")
        if machine.users_of_device:
            return machine.misuse("finalize-with-device", "finalize", NOT_CLEARED, "reset_device was not called")
        return 0

    def get_soc_name(self) -> str:
        """Return the chip's name."""
        return self._machine.soc_name

    def get_recent_err_msg(self) -> str:
        """Return this thread's last message."""
        return self._machine.take_message()

    def create_data_buffer(self, address: int, size: int) -> int:
        """Return a data buffer."""
        return self._machine.handles.add(DataBuffer(address, size))

    def update_data_buffer(self, handle: int, address: int, size: int) -> int:
        """Let a data buffer be elsewhere."""
        buffer = self._machine.handles.get(handle, DataBuffer)
        if buffer is None:
            return self._machine.misuse("destroyed-buffer", "update_data_buffer", INVALID_PARAM, "no data buffer")
        if self._machine.touching(buffer.address, buffer.size_bytes):
            self._machine.misuse("buffer-in-use", "update_data_buffer", 0, "a run that uses it was not waited for")
        buffer.address, buffer.size_bytes = address, size
        return 0

    def destroy_data_buffer(self, handle: int) -> int:
        """Forget a data buffer; its memory stays."""
        if self._machine.handles.get(handle, DataBuffer) is None:
            return self._machine.misuse("destroyed-twice", "destroy_data_buffer", INVALID_PARAM, "no data buffer")
        self._machine.handles.pop(handle)
        return 0

    def get_data_buffer_addr(self, handle: int) -> int:
        """Return where a data buffer is."""
        buffer = self._machine.handles.get(handle, DataBuffer)
        return 0 if buffer is None else int(buffer.address)

    def get_data_buffer_size(self, handle: int) -> int:
        """Return how large it is."""
        buffer = self._machine.handles.get(handle, DataBuffer)
        return 0 if buffer is None else int(buffer.size_bytes)


class UtilCalls:
    """`acl.util`: addresses of Python objects."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def numpy_to_ptr(self, array: npt.NDArray[Any]) -> int:
        """Return the address of an array, which the program must keep."""
        machine = self._machine
        if not array.flags.c_contiguous:
            machine.misuse("not-contiguous", "numpy_to_ptr", 0, "the array's elements do not lie side by side")
        owner = array if array.base is None or not isinstance(array.base, np.ndarray) else array.base
        machine.host.show(array.ctypes.data, array.nbytes, weakref.ref(owner))
        return int(array.ctypes.data)

    def bytes_to_ptr(self, content: bytes) -> int:
        """Return the address of bytes; they are kept."""
        array = np.frombuffer(content, np.uint8)
        self._machine.host.show(array.ctypes.data, array.nbytes, content)
        return int(array.ctypes.data)

    def ptr_to_bytes(self, address: int, size: int) -> bytes:
        """Return a copy of host memory."""
        return self._host("ptr_to_bytes", address, size).tobytes()

    def ptr_to_numpy(self, address: int, shape: tuple[int, ...], numpy_type: int) -> npt.NDArray[Any]:
        """Return host memory as an array."""
        dtype = np.dtype(_NUMPY_TYPES[numpy_type])
        size = int(np.prod(shape)) * dtype.itemsize
        return self._host("ptr_to_numpy", address, size).view(dtype).reshape(shape)

    def _host(self, call: str, address: int, size: int) -> npt.NDArray[np.uint8]:
        machine = self._machine
        found = machine.host.find(address)
        if found is None or address + size > found.start + found.size_bytes:
            is_device = machine.device.is_device(address)
            kind = "device-pointer-as-host" if is_device else "unknown-host-pointer"
            machine.misuse(kind, call, INVALID_PARAM, f"{address:#x} cannot be read by the host")
            return np.zeros(size, np.uint8)
        return host_bytes(address, size)


def build_module(machine: Machine, workshop: Workshop) -> ModuleType:
    """Return the stand-in for `acl`."""
    module: Any = ModuleType("acl", __doc__)
    module.IS_SIMULATED = True
    loaded = LoadedModels()
    models = (LoadingCalls(machine, loaded, workshop), DescriptionCalls(machine, loaded), RunCalls(machine, loaded))
    module.rt, module.mdl, module.util = (ModuleType(f"acl.{name}") for name in ("rt", "mdl", "util"))
    for target, calls in (
        (module, TopCalls(machine)),
        (module.rt, RuntimeCalls(machine)),
        (module.util, UtilCalls(machine)),
        *((module.mdl, part) for part in models),
    ):
        for name, function in inspect.getmembers(calls, inspect.ismethod):
            if not name.startswith("_"):
                setattr(target, name, guarded(machine, function))
    if not machine.release.shares_weights:
        del module.mdl.set_external_weight_address
    return module  # type: ignore[no-any-return]


@contextmanager
def simulated_acl(
    soc_version: str = "Ascend910B4", *, cann: str = "8.1", threads: int = 1, memory_bytes: int | None = None
) -> Iterator[Machine]:
    """Put the stand-in in the place of `acl` while the block runs; at its end ACL is finalized and leaks are reported.

    Args:
        soc_version: Chip the device claims to be.
        cann: Release to behave like.
        threads: Computing threads of a model.
        memory_bytes: Device memory; the chip's by default.
    """
    chip = chip_named(soc_version)
    machine = Machine(chip.name, memory_bytes or chip.memory_bytes, release_of(cann))
    workshop = Workshop(threads)
    module = build_module(machine, workshop)
    previous = sys.modules.get("acl")
    sys.modules["acl"] = module
    try:
        yield machine
    finally:
        if previous is None:
            del sys.modules["acl"]
        else:
            sys.modules["acl"] = previous
        finalize_acl(module)
        workshop.close()
