"""Every way to misuse ACL that the simulated device knows: what to do wrong, what is reported, and the code it gives."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

HUGE, H2D, D2H, D2D = 0, 1, 2, 3


@dataclass
class Program:
    """A program that has done everything right so far: a context, a stream, a loaded model with its buffers."""

    acl: Any
    om: Path
    context: int = 0
    stream: int = 0
    model: int = 0
    inputs: int = 0
    outputs: int = 0
    buffers: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def start(self) -> None:
        acl = self.acl
        assert acl.init() == 0
        assert acl.rt.set_device(0) == 0
        self.context = self.value(acl.rt.create_context(0))
        self.stream = self.value(acl.rt.create_stream())
        self.model = self.value(acl.mdl.load_from_file(str(self.om)))
        description = acl.mdl.create_desc()
        assert acl.mdl.get_desc(description, self.model) == 0
        for side in ("input", "output"):
            dataset = acl.mdl.create_dataset()
            for index in range(getattr(acl.mdl, f"get_num_{side}s")(description)):
                size = getattr(acl.mdl, f"get_{side}_size_by_index")(description, index)
                self.sizes.append(size)
                self.places.append(self.device(size))
                assert acl.rt.memset(self.places[-1], size, 0, size) == 0
                self.buffers.append(acl.create_data_buffer(self.places[-1], size))
                assert acl.mdl.add_dataset_buffer(dataset, self.buffers[-1])[1] == 0
            setattr(self, f"{side}s", dataset)
        acl.mdl.destroy_desc(description)

    @staticmethod
    def value(pair: tuple[int, int]) -> int:
        assert pair[1] == 0
        return pair[0]

    def device(self, size: int = 256) -> int:
        return self.value(self.acl.rt.malloc(size, HUGE))

    def pinned(self, size: int = 256) -> int:
        return self.value(self.acl.rt.malloc_host(size))

    def run(self) -> int:
        return int(self.acl.mdl.execute(self.model, self.inputs, self.outputs))

    def elsewhere(self, call: Callable[[], int]) -> int:
        """Call in a thread of its own."""
        codes: list[int] = []
        thread = threading.Thread(target=lambda: codes.append(call()))
        thread.start()
        thread.join()
        return codes[0]


def use_after_free(p: Program) -> int:
    address = p.device()
    p.acl.rt.free(address)
    return int(p.acl.rt.memset(address, 256, 0, 256))


def double_free(p: Program) -> int:
    address = p.device()
    p.acl.rt.free(address)
    return int(p.acl.rt.free(address))


def double_free_of_host(p: Program) -> int:
    address = p.pinned()
    p.acl.rt.free_host(address)
    return int(p.acl.rt.free_host(address))


def free_in_use(p: Program) -> int:
    address = p.device()
    p.acl.rt.memcpy_async(address, 256, p.pinned(), 256, H2D, p.stream)
    return int(p.acl.rt.free(address))


def freed_before_it_ran(p: Program) -> int:
    p.acl.mdl.execute_async(p.model, p.inputs, p.outputs, p.stream)
    return int(p.acl.rt.free(p.places[0]))


def dead_array(p: Program) -> int:
    array = np.zeros(256, np.uint8)
    pointer = p.acl.util.numpy_to_ptr(array)
    del array
    gc.collect()
    return int(p.acl.rt.memcpy(p.device(), 256, pointer, 256, H2D))


def short_array(p: Program) -> int:
    array = np.zeros(100, np.uint8)
    return int(p.acl.rt.memcpy(p.device(), 256, p.acl.util.numpy_to_ptr(array), 256, H2D))


def pageable(p: Program) -> int:
    block = np.zeros(512, np.uint8)
    array = block[-block.ctypes.data % 64 :][:256]
    return int(p.acl.rt.memcpy_async(p.device(), 256, p.acl.util.numpy_to_ptr(array), 256, H2D, p.stream))


def bound(p: Program, index: int, address: int, size: int) -> int:
    p.acl.update_data_buffer(p.buffers[index], address, size)
    return p.run()


def too_few_buffers(p: Program) -> int:
    dataset = p.acl.mdl.create_dataset()
    p.acl.mdl.add_dataset_buffer(dataset, p.buffers[0])
    return int(p.acl.mdl.execute(p.model, dataset, p.outputs))


def too_few_outputs(p: Program) -> int:
    return int(p.acl.mdl.execute(p.model, p.inputs, p.acl.mdl.create_dataset()))


def destroyed_buffer(p: Program) -> int:
    p.acl.destroy_data_buffer(p.buffers[0])
    return p.run()


def destroyed_dataset(p: Program) -> int:
    p.acl.mdl.destroy_dataset(p.inputs)
    return p.run()


def twice(call: Callable[[], int]) -> int:
    call()
    return call()


def after_unload(p: Program) -> int:
    p.acl.mdl.unload(p.model)
    return p.run()


def foreign_stream(p: Program) -> int:
    p.value(p.acl.rt.create_context(0))
    return int(p.acl.rt.synchronize_stream(p.stream))


def destroyed_stream(p: Program) -> int:
    stream = p.value(p.acl.rt.create_stream())
    p.acl.rt.destroy_stream(stream)
    return int(p.acl.mdl.execute_async(p.model, p.inputs, p.outputs, stream))


def dead_context(p: Program) -> int:
    p.acl.rt.destroy_stream(p.stream)
    p.acl.rt.destroy_context(p.context)
    return int(p.acl.rt.malloc(64, HUGE)[1])


def two_streams(p: Program) -> int:
    p.acl.mdl.execute_async(p.model, p.inputs, p.outputs, p.stream)
    return int(p.acl.mdl.execute_async(p.model, p.inputs, p.outputs, p.value(p.acl.rt.create_stream())))


def moved_while_running(p: Program) -> int:
    p.acl.mdl.execute_async(p.model, p.inputs, p.outputs, p.stream)
    return int(p.acl.update_data_buffer(p.buffers[0], p.device(p.sizes[0]), p.sizes[0]))


def unloaded_while_running(p: Program) -> int:
    p.acl.mdl.execute_async(p.model, p.inputs, p.outputs, p.stream)
    return int(p.acl.mdl.unload(p.model))


def stream_with_work(p: Program) -> int:
    p.acl.rt.memcpy_async(p.device(), 256, p.pinned(), 256, H2D, p.stream)
    return int(p.acl.rt.destroy_stream(p.stream))


def configured(p: Program, **options: int) -> int:
    mdl = p.acl.mdl
    handle = mdl.create_config_handle()
    numbers = {"kind": 1, "work": 7, "work_size": 8}
    mdl.set_config_opt(handle, 2, str(p.om))
    for name, value in options.items():
        mdl.set_config_opt(handle, numbers[name], value)
    return int(mdl.load_with_config(handle)[1])


def weights_not_copied(p: Program) -> int:
    mdl = p.acl.mdl
    handle = mdl.create_config_handle()
    mdl.set_config_opt(handle, 1, 1)
    mdl.set_config_opt(handle, 2, str(p.om))
    for weight in sorted((p.om.parent / "weight").iterdir()):
        size = -(-weight.stat().st_size // 32) * 32
        mdl.set_external_weight_address(handle, weight.name, p.device(size), size)
    return int(mdl.load_with_config(handle)[1])


def beyond_the_inputs(p: Program) -> int:
    description = p.acl.mdl.create_desc()
    p.acl.mdl.get_desc(description, p.model)
    return int(p.acl.mdl.get_input_size_by_index(description, 99))


def reset_with_memory(p: Program) -> int:
    return int(p.acl.rt.reset_device(0))


def finalize_with_memory(p: Program) -> int:
    return int(p.acl.finalize())


Wrong = Callable[[Program], int]
# kind of report -> what to do wrong, and the code it gives
MISUSES: dict[str, tuple[str, Wrong, int]] = {
    "init twice": ("repeated-init", lambda p: p.acl.init(), 100002),
    "a device that is not there": ("no-such-device", lambda p: p.acl.rt.set_device(7), 107001),
    "no context in another thread": ("no-context", lambda p: p.elsewhere(p.run), 107002),
    "a context that was destroyed": ("dead-context", dead_context, 107002),
    "a number that is no context": ("unknown-context", lambda p: p.acl.rt.set_context(12345), 107000),
    "a context destroyed before its stream": (
        "context-with-streams",
        lambda p: p.acl.rt.destroy_context(p.context),
        148051,
    ),
    "a stream of another context": ("foreign-stream", foreign_stream, 107003),
    "a stream that was destroyed": ("unknown-stream", destroyed_stream, 107000),
    "a stream destroyed with work on it": ("stream-with-work", stream_with_work, 0),
    "malloc of nothing": ("malloc-of-nothing", lambda p: p.acl.rt.malloc(0, HUGE)[1], 100000),
    "an unknown malloc policy": ("bad-policy", lambda p: p.acl.rt.malloc(64, 99)[1], 100000),
    "free of what was never allocated": ("free-of-unknown", lambda p: p.acl.rt.free(0x1234), 107000),
    "double free": ("double-free", double_free, 107000),
    "double free of host memory": ("double-free", double_free_of_host, 107000),
    "free inside an allocation": ("free-inside", lambda p: p.acl.rt.free(p.device() + 64), 107000),
    "free of host memory": ("free-of-host-memory", lambda p: p.acl.rt.free(p.pinned()), 107000),
    "free_host of device memory": ("free-host-of-device-memory", lambda p: p.acl.rt.free_host(p.device()), 107000),
    "free of what a copy still uses": ("free-in-use", free_in_use, 107000),
    "free of what a run still uses": ("free-in-use", freed_before_it_ran, 107000),
    "use after free": ("use-after-free", use_after_free, 107000),
    "a host pointer as device memory": (
        "host-pointer-as-device",
        lambda p: p.acl.rt.memcpy(p.pinned(), 256, p.pinned(), 256, H2D),
        107000,
    ),
    "a device pointer as host memory": (
        "device-pointer-as-host",
        lambda p: p.acl.rt.memcpy(p.device(), 256, p.device(), 256, H2D),
        107000,
    ),
    "a host address out of the blue": (
        "unknown-host-pointer",
        lambda p: p.acl.rt.memcpy(p.device(), 256, 0x7F00_0000_0040, 256, H2D),
        107000,
    ),
    "a null pointer": ("null-pointer", lambda p: p.acl.rt.memset(0, 64, 0, 64), 107000),
    "reading device memory from the host": (
        "device-pointer-as-host",
        lambda p: len(p.acl.util.ptr_to_bytes(p.device(), 8)),
        8,
    ),
    "a copy beyond device memory": (
        "device-overrun",
        lambda p: p.acl.rt.memcpy(p.device(100), 256, p.pinned(), 256, H2D),
        107000,
    ),
    "a copy beyond a host array": ("host-overrun", short_array, 107000),
    "a copy larger than its target": (
        "bad-copy-size",
        lambda p: p.acl.rt.memcpy(p.device(), 100, p.pinned(), 256, H2D),
        100000,
    ),
    "an unknown kind of copy": ("bad-copy-kind", lambda p: p.acl.rt.memcpy(p.device(), 64, p.pinned(), 64, 9), 100000),
    "an array that is gone": ("dead-host-array", dead_array, 107000),
    "an array with gaps": ("not-contiguous", lambda p: p.acl.util.numpy_to_ptr(np.zeros((4, 4))[:, ::2]) * 0, 0),
    "an asynchronous copy that is not aligned": (
        "unaligned",
        lambda p: p.acl.rt.memcpy_async(p.device() + 32, 64, p.pinned(), 64, H2D, p.stream),
        107008,
    ),
    "an asynchronous copy of pageable memory": ("pageable-memory", pageable, 0),
    "a load without its kind": ("bad-load-option", configured, 100000),
    "work space that is too small": (
        "work-space-too-small",
        lambda p: configured(p, kind=2, work=p.device(64), work_size=64),
        145000,
    ),
    "work space on the host": (
        "host-pointer-as-device",
        lambda p: configured(p, kind=2, work=p.pinned(1 << 16), work_size=1 << 16),
        107000,
    ),
    "weights that were not copied": ("weights-not-copied", weights_not_copied, 545001),
    "a description of no model": ("unknown-model", lambda p: p.acl.mdl.get_desc(p.acl.mdl.create_desc(), 99), 145003),
    "an index beyond the inputs": (
        "unknown-description",
        lambda p: p.acl.mdl.get_num_inputs(p.acl.mdl.create_desc()),
        0,
    ),
    "a run of a model that was never loaded": (
        "unknown-model",
        lambda p: p.acl.mdl.execute(99, p.inputs, p.outputs),
        145003,
    ),
    "a run after unload": ("execute-after-unload", after_unload, 145003),
    "unload twice": ("unload-twice", lambda p: twice(lambda: p.acl.mdl.unload(p.model)), 145003),
    "unload while it runs": ("unload-in-use", unloaded_while_running, 0),
    "one model on two streams": ("two-streams", two_streams, 145000),
    "too few input buffers": ("wrong-number-of-buffers", too_few_buffers, 100017),
    "too few output buffers": ("wrong-number-of-buffers", too_few_outputs, 100018),
    "an input buffer that is too small": ("buffer-too-small", lambda p: bound(p, 0, p.device(8), 8), 145000),
    "an input buffer that claims more than it has": (
        "device-overrun",
        lambda p: bound(p, 0, p.device(8), p.sizes[0]),
        107000,
    ),
    "an input on the host": ("host-pointer-as-device", lambda p: bound(p, 0, p.pinned(p.sizes[0]), p.sizes[0]), 107000),
    "an input that is not aligned": (
        "unaligned",
        lambda p: bound(p, 0, p.device(p.sizes[0] + 64) + 32, p.sizes[0]),
        200003,
    ),
    "an output on an input": ("output-overlaps", lambda p: bound(p, -1, p.places[2], p.sizes[-1]), 145000),
    "a data buffer that was destroyed": ("destroyed-buffer", destroyed_buffer, 100000),
    "a data set that was destroyed": ("unknown-dataset", destroyed_dataset, 100000),
    "destroying a data set twice": (
        "destroyed-twice",
        lambda p: twice(lambda: p.acl.mdl.destroy_dataset(p.inputs)),
        100000,
    ),
    "moving a buffer while a run uses it": ("buffer-in-use", moved_while_running, 0),
    "a gear of a model without gears": (
        "wrong-gear",
        lambda p: p.acl.mdl.set_dynamic_batch_size(p.model, p.inputs, 0, 2),
        100019,
    ),
    "reset with memory left": ("device-leak", reset_with_memory, 148051),
    "finalize with memory left": ("device-leak", finalize_with_memory, 148051),
    "finalize twice": ("repeated-finalize", lambda p: twice(lambda: p.acl.finalize()), 100037),
}
