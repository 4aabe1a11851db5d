"""One NPU: context, stream, memory and copies, with ACL's codes as SessionErrors and everything released.

Memory: an address handed to a model or an asynchronous copy is a multiple of 64, and a part of a larger allocation is
followed by 32 bytes that belong to it (CANN's rule for whoever divides an allocation).
"""

import ctypes
import logging
import os
from contextlib import ExitStack
from functools import partial
from typing import Any, List, Optional, Sequence, Tuple

import numpy as np

from .acl_errors import OUT_OF_MEMORY, meaning
from .acl_process import release_acl, release_device, take_acl, take_device
from .errors import SessionError

ALIGNMENT = 64
HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE = 1, 2, 3
_HUGE_FIRST = 0
_PIECE_BYTES = 64 << 20
_MAX_WIDTH_BYTES = 5_000_000  # of a two-dimensional copy
_NOT_SUPPORTED = frozenset({100000, 107000, 200001, 207000})

logger = logging.getLogger(__name__)


def segments(sizes: Sequence[int]) -> Tuple[List[int], int]:
    """Return where parts of these sizes start in one allocation, and its size."""
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += padded(size)
    return starts, end


def padded(size_bytes: int) -> int:
    """Return how far apart parts of that size start."""
    whole = -(-size_bytes // 32) * 32 + 32
    return -(-whole // ALIGNMENT) * ALIGNMENT


class HostBuffer:
    """Pinned host memory, seen as bytes."""

    def __init__(self, address: int, size_bytes: int) -> None:
        self.address = address
        self.bytes: np.ndarray = np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(address))

    def view(self, start: int, dtype: Any, count: int) -> np.ndarray:
        """Return `count` elements from byte `start` on."""
        size_bytes = count * int(np.dtype(dtype).itemsize)
        found: np.ndarray = self.bytes[start : start + size_bytes].view(dtype)
        return found


class AclDevice:
    """A device with a context and a stream of its own.

    Args:
        device_id: Which; None takes $ASCEND_DEVICE_ID or 0.

    Raises:
        SessionError: `acl` is missing, or the device cannot be opened; nothing is left open then.
    """

    def __init__(self, device_id: Optional[int] = None) -> None:
        self.device_id = _device_id() if device_id is None else device_id
        self._open = ExitStack()
        self._copies_rows = True
        try:
            self.acl: Any = take_acl()
            self._open.callback(release_acl, self.acl)
            take_device(self.acl, self.device_id)
            self._at_close("acl.rt.reset_device", partial(release_device, self.acl), self.device_id)
            self._context: int = self.value("acl.rt.create_context", self.acl.rt.create_context(self.device_id))
            self._at_close("acl.rt.destroy_context", self.acl.rt.destroy_context, self._context)
            self.stream: int = self.value("acl.rt.create_stream", self.acl.rt.create_stream())
            self._at_close("acl.rt.destroy_stream", self.acl.rt.destroy_stream, self.stream)
            self.soc_name = str(self.acl.get_soc_name() or "")
        except BaseException:
            self._open.close()
            raise

    def enter(self) -> None:
        """Make the context current in this thread; every entry from outside starts with it."""
        self.call("acl.rt.set_context", self.acl.rt.set_context(self._context))

    def reenter(self) -> None:
        """Do the same before things are given back; a failure is logged."""
        self.release("acl.rt.set_context", self.acl.rt.set_context, self._context)

    def close(self) -> None:
        """Release stream, context and device; harmless when repeated."""
        self._open.close()

    def call(self, name: str, code: int) -> None:
        """Raise for a code that is not 0, with its meaning and ACL's own message."""
        if code != 0:
            raise SessionError(self.failure(name, code))

    def value(self, name: str, result: Tuple[Any, int]) -> Any:
        """Return the value of a (value, code) pair, or raise."""
        value, code = result
        self.call(name, code)
        return value

    def failure(self, name: str, code: int) -> str:
        """Return a line on a failed call."""
        detail = " ".join(str(self.acl.get_recent_err_msg() or "").split())
        text = f"{name}: {code}, {meaning(code)}" + (f" ({detail[:500]})" if detail else "")
        if code in OUT_OF_MEMORY:
            text += "; lower max_batch_size or max_model_len, or compile fewer or smaller buckets"
        return text

    # memory

    def malloc(self, size_bytes: int, what: str) -> int:
        """Return device memory.

        Raises:
            SessionError: There is not enough; the message says for what.
        """
        address, code = self.acl.rt.malloc(size_bytes, _HUGE_FIRST)
        if code != 0:
            free, total, asked = self.acl.rt.get_mem_info(1)
            left = f"; {free / 1e9:.2f} of {total / 1e9:.2f} GB are free" if asked == 0 else ""
            raise SessionError(
                f"no memory for {what} ({size_bytes / 1e9:.3f} GB{left}): {self.failure('malloc', code)}"
            )
        return int(address)

    def free(self, address: int) -> None:
        """Free device memory; a failure is logged."""
        self.release("acl.rt.free", self.acl.rt.free, address)

    def malloc_host(self, size_bytes: int) -> HostBuffer:
        """Return pinned host memory."""
        return HostBuffer(self.value("acl.rt.malloc_host", self.acl.rt.malloc_host(size_bytes)), size_bytes)

    def free_host(self, buffer: HostBuffer) -> None:
        """Free pinned host memory; a failure is logged."""
        self.release("acl.rt.free_host", self.acl.rt.free_host, buffer.address)

    def zero(self, address: int, size_bytes: int) -> None:
        """Fill with zeros; fresh device memory holds anything, NaN included."""
        self.call("acl.rt.memset", self.acl.rt.memset(address, size_bytes, 0, size_bytes))

    # copies

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy a large contiguous array to the device, and wait."""
        raw = array.reshape(-1).view(np.uint8)
        for start in range(0, raw.size, _PIECE_BYTES):
            piece = raw[start : start + _PIECE_BYTES]
            source = (
                piece.ctypes.data if not hasattr(self.acl.util, "numpy_to_ptr") else self.acl.util.numpy_to_ptr(piece)
            )
            code = self.acl.rt.memcpy(address + start, raw.size - start, source, piece.size, HOST_TO_DEVICE)
            self.call("acl.rt.memcpy", code)

    def copy(self, target: int, source: int, size_bytes: int, kind: int) -> None:
        """Copy on the stream; host memory is pinned, addresses are aligned."""
        code = self.acl.rt.memcpy_async(target, size_bytes, source, size_bytes, kind, self.stream)
        self.call("acl.rt.memcpy_async", code)

    def copy_rows(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int
    ) -> None:
        """Copy `height` rows of `width` bytes within the device, on the stream.

        One two-dimensional copy where CANN has it for this chip (documented for 910B in newer releases; 8.1 refuses
        it), else one copy per row.
        """
        rows = getattr(self.acl.rt, "memcpy2d_async", None)
        if self._copies_rows and rows is not None and width <= _MAX_WIDTH_BYTES:
            code = rows(target, target_pitch, source, source_pitch, width, height, DEVICE_TO_DEVICE, self.stream)
            if code not in _NOT_SUPPORTED:
                self.call("acl.rt.memcpy2d_async", code)
                return
            self._copies_rows = False
            self.acl.get_recent_err_msg()
            logger.info("this CANN copies no rows within the device at once: %d copies instead of one", height)
        for row in range(height):
            self._copy_row(target + row * target_pitch, source + row * source_pitch, width)

    def _copy_row(self, target: int, source: int, width: int) -> None:
        if target % ALIGNMENT == 0 and source % ALIGNMENT == 0:
            self.copy(target, source, width, DEVICE_TO_DEVICE)
            return
        self.synchronize()  # a copy that waits does not queue behind what the stream holds
        self.call("acl.rt.memcpy", self.acl.rt.memcpy(target, width, source, width, DEVICE_TO_DEVICE))

    def synchronize(self) -> None:
        """Wait for the stream; what failed on the way is raised here."""
        self.call("acl.rt.synchronize_stream", self.acl.rt.synchronize_stream(self.stream))

    def drain(self) -> None:
        """Wait for the stream after a failure, whatever it says: buffers may be reused or freed then."""
        self.acl.rt.synchronize_stream(self.stream)
        self.acl.get_recent_err_msg()

    def _at_close(self, name: str, function: Any, argument: int) -> None:
        self._open.callback(self.release, name, function, argument)

    def release(self, name: str, function: Any, argument: int) -> None:
        """Give something back; a failure is logged, so that what comes after it is given back too."""
        code = function(argument)
        if code != 0:
            logger.warning("%s", self.failure(name, code))


def _device_id() -> int:
    text = os.environ.get("ASCEND_DEVICE_ID", "0")
    if not text.isdigit():
        raise SessionError(f"ASCEND_DEVICE_ID is {text!r}; the number of a device is wanted")
    return int(text)
