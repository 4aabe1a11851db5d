"""Weights in pages of 2 MB: a decode step reads all of them, and in pages of 4 KB every one costs a table walk.

ONNX Runtime allocates as malloc does, in small pages wherever the system's setting for transparent huge pages is
`madvise`, the default of most distributions. Measured on a 0.5B model (two cores, both in one process, turns of ten
steps): int8 decodes 5 to 8 % faster, 4 % at batch 8; int4 2 to 6 %, 2 % at batch 8. Moving 450 MB takes 0.1 s where free
memory is in one piece, 1 s where the kernel must make room first.
"""

import ctypes
import errno
import logging
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator, List, Tuple

logger = logging.getLogger(__name__)

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MAPS = Path("/proc/self/maps")
_PAGE = 2 << 20
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # Linux 2.6.38 and 6.1
_SMALLEST_BUDGET_S = 1.5
Region = Tuple[int, int]  # first address, and the one behind the last


@contextmanager
def huge_pages(setting: Path = _SETTING) -> Iterator[None]:
    """Move the memory that is allocated within to huge pages, for as long as the allocating took or a second and a half.

    Best effort: nothing happens on other systems than Linux, or where the administrator has set `never`. A kernel that
    cannot move pages at once is asked to do it in the background.
    """
    before, started = _anonymous_regions(), time.monotonic()
    yield
    release_free_memory()
    if not _is_allowed(setting):
        return
    budget_s = max(_SMALLEST_BUDGET_S, time.monotonic() - started)
    num_moved = collapse(_without(_anonymous_regions(), before), time.monotonic() + budget_s)
    logger.debug("%d MB moved to huge pages", num_moved * _PAGE >> 20)


def release_free_memory() -> None:
    """Give freed memory back to the system, where the C library can (glibc).

    What was computed while a graph was loaded (codes that are unpacked, 6 bytes for each of them on the way) is free then, but
    in small pages among what stays, and would count as resident for good.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def collapse(regions: List[Region], deadline: float) -> int:
    """Move whole pages of 2 MB within regions of memory until a time of `time.monotonic`; return how many were."""
    advise, num_moved = _madvise(), 0
    for first, end in regions:
        for address in range(-(-first // _PAGE) * _PAGE, end - _PAGE + 1, _PAGE):
            if time.monotonic() >= deadline:
                return num_moved
            error = advise(address, _PAGE, _MADV_COLLAPSE)
            if error == errno.EINVAL and num_moved == 0:
                advise(address, _PAGE, _MADV_HUGEPAGE)  # no such call here, or no memory that can be moved
            num_moved += error == 0
    return num_moved


def _is_allowed(setting: Path) -> bool:
    try:
        return sys.platform == "linux" and "[never]" not in setting.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):  # a kernel without huge pages
        return False


def _madvise() -> Callable[[int, int, int], int]:
    """Return madvise(address, length, advice), which returns an errno, or 0."""
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def advise(address: int, length: int, advice: int) -> int:
        return ctypes.get_errno() if function(address, length, advice) else 0

    return advise


def _anonymous_regions(maps: Path = _MAPS) -> List[Region]:
    """Return the private writable memory of this process that stands for no file and is no stack; none without /proc."""
    found = []
    try:
        lines = maps.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        addresses, permissions, *rest = line.split(maxsplit=5)
        name = rest[3] if len(rest) > 3 else ""
        if permissions == "rw-p" and (not name or name == "[heap]" or name.startswith("[anon")):
            first, _, end = addresses.partition("-")
            found.append((int(first, 16), int(end, 16)))
    return found


def _without(regions: List[Region], known: List[Region]) -> List[Region]:
    """Return what of regions is not in known ones, both in order: mappings that touch are one line of the kernel's list."""
    found, rest = [], iter(known)
    other = next(rest, None)
    for first, end in regions:
        while other is not None and other[0] < end:
            if first < other[0]:
                found.append((first, other[0]))
            first = max(first, other[1])
            if other[1] > end:
                break
            other = next(rest, None)
        if first < end:
            found.append((first, end))
    return found
