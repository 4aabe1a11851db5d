"""Memory in huge pages: what is moved, when nothing is, and the kernel's list of mappings."""

import errno
import mmap
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
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    for offset in range(0, size, 4096):
        memory[offset] = 7
    memory.madvise(mmap.MADV_HUGEPAGE)  # may be moved from now on
    return memory


def huge_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("AnonHugePages:"))


def can_collapse() -> bool:
    if sys.platform != "linux" or not Path("/proc/self/smaps_rollup").exists():
        return False
    memory, before = allocated(), huge_bytes()
    collapse(module._anonymous_regions(), time.monotonic() + 5)
    moved = huge_bytes() - before
    memory.close()
    return moved > 0


linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")


@linux
def test_what_is_allocated_within_is_moved_and_keeps_its_contents(tmp_path: Path) -> None:
    if not can_collapse():
        pytest.skip("this kernel moves no memory to huge pages at once")
    setting = tmp_path / "enabled"
    setting.write_text("always [madvise] never\n")
    outside, before = allocated(), huge_bytes()
    with huge_pages(setting):
        inside = allocated()
    assert huge_bytes() - before >= len(inside) - 4 * MB
    assert huge_bytes() - before <= len(inside) + 8 * MB  # and not what was there before
    assert set(inside[0::4096]) == set(outside[0::4096]) == {7}


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
