"""Memory in huge pages: what is moved, when nothing is, and the kernel's list of mappings."""

import ctypes
import errno
import mmap
import re
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.runtime import huge_pages as module
from qcompile.runtime.huge_pages import collapse, huge_pages

MB = 1 << 20


def allocated(size: int = 16 * MB) -> mmap.mmap:
    """Private memory in small pages, touched."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for offset in range(0, size, 4096):
        memory[offset] = 7
    return memory


def region_of(memory: mmap.mmap) -> "tuple[int, int]":
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return address, address + len(memory)


def huge_bytes(memory: mmap.mmap) -> int:
    """Bytes of huge pages in the kernel's mappings that memory is part of."""
    first, end = region_of(memory)
    found, is_part = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
        head = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if head:
            is_part = int(head[1], 16) < end and int(head[2], 16) > first
        elif is_part and line.startswith("AnonHugePages:"):
            found += int(line.split()[1]) << 10
    return found


linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")


@pytest.fixture
def setting(tmp_path: Path) -> Path:
    path = tmp_path / "enabled"
    path.write_text("always [madvise] never\n")
    return path


@linux
def test_memory_is_moved_and_keeps_its_contents(setting: Path) -> None:
    probe = allocated()
    if not collapse([region_of(probe)], time.monotonic() + 5):
        pytest.skip("this kernel moves no memory to huge pages at once")
    with huge_pages(setting):
        inside = allocated()
    assert huge_bytes(inside) >= len(inside) - 4 * MB
    assert set(inside[0::4096]) == {7}


@linux
def test_what_was_there_before_is_left_alone(setting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(module, "collapse", lambda regions, deadline: asked.extend(regions) or 0)
    outside = allocated()
    with huge_pages(setting):
        inside = allocated()
    (first, end), (a, b) = region_of(outside), region_of(inside)
    assert any(x <= a and b <= y for x, y in asked)
    assert not any(x < end and first < y for x, y in asked)


@linux
@pytest.mark.parametrize("text", ["always madvise [never]", None])
def test_an_administrators_never_and_a_kernel_without_them_are_left_alone(
    text: "str | None", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = tmp_path / "enabled"
    if text is not None:
        setting.write_text(text)
    monkeypatch.setattr(module, "collapse", lambda *_: pytest.fail("memory was moved"))
    with huge_pages(setting):
        pass


@linux
def test_an_error_within_is_not_swallowed(tmp_path: Path) -> None:
    setting = tmp_path / "enabled"
    setting.write_text("[always] madvise never")
    with pytest.raises(KeyError), huge_pages(setting):
        raise KeyError("within")


class Kernel:
    """Notes what it is advised, and answers alike."""

    def __init__(self, answer: int) -> None:
        self.answer = answer
        self.calls: list[tuple[int, int, int]] = []

    def __call__(self, address: int, length: int, advice: int) -> int:
        self.calls.append((address, length, advice))
        return self.answer


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    found = Kernel(0)
    monkeypatch.setattr(module, "_madvise", lambda: found)
    return found


def test_only_whole_pages_of_two_megabytes_are_asked_for(kernel: Kernel) -> None:
    regions = [(MB, 6 * MB + 5), (6 * MB + 5, 8 * MB - 1), (10 * MB, 12 * MB)]
    assert collapse(regions, time.monotonic() + 5) == 3
    assert kernel.calls == [(2 * MB, 2 * MB, 25), (4 * MB, 2 * MB, 25), (10 * MB, 2 * MB, 25)]


def test_an_old_kernel_is_asked_for_the_background(kernel: Kernel) -> None:
    kernel.answer = errno.EINVAL
    assert collapse([(0, 4 * MB)], time.monotonic() + 5) == 0
    assert [advice for _, _, advice in kernel.calls] == [25, 14, 25, 14]


def test_no_longer_than_until_the_deadline(kernel: Kernel) -> None:
    assert collapse([(0, 4 * MB)], time.monotonic()) == 0
    assert kernel.calls == []


def test_without_proc_nothing_counts(tmp_path: Path) -> None:
    assert module._anonymous_regions(tmp_path / "maps") == []


def test_which_mappings_count(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.write_text(
        "00400000-00452000 r-xp 00000000 08:02 173521      /usr/bin/python\n"
        "00e03000-00e24000 rw-p 00000000 00:00 0           [heap]\n"
        "35b1800000-35b1820000 rw-p 00000000 00:00 0 \n"
        "35b1a00000-35b1a20000 rw-p 00000000 00:00 0 [anon:arena]\n"
        "35b1c00000-35b1c20000 rw-s 00000000 00:01 12 /dev/zero (deleted)\n"
        "35b1e00000-35b1e20000 ---p 00000000 00:00 0 \n"
        "7fff00000000-7fff00020000 rw-p 00000000 00:00 0 [stack]\n"
    )
    found = module._anonymous_regions(maps)
    assert found == [(0xE03000, 0xE24000), (0x35B1800000, 0x35B1820000), (0x35B1A00000, 0x35B1A20000)]


ORDERED = (
    st.lists(st.integers(0, 40), max_size=10, unique=True)
    .map(sorted)
    .map(lambda xs: list(zip(xs[::2], xs[1::2], strict=False)))
)


@given(ORDERED, ORDERED)
def test_new_memory_is_what_was_not_there_before(now: "list[tuple[int, int]]", before: "list[tuple[int, int]]") -> None:
    numbers = {x for first, end in now for x in range(first, end)} - {x for a, b in before for x in range(a, b)}
    found = module._without(now, before)
    assert [x for first, end in found for x in range(first, end)] == sorted(numbers)
    assert all(first < end for first, end in found)
