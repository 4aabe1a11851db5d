"""Cores and memory, from faked /sys and /proc files."""

from pathlib import Path

import pytest

from qcompile.runtime import host


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="ascii")


def test_at_least_one() -> None:
    assert host.default_threads() >= 1


def test_smt_siblings_share_a_core(tmp_path: Path) -> None:
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        write(tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list", siblings + "\n")
    write(tmp_path / "cpu4" / "topology" / "core_cpus_list", "4-5\n")
    assert host._physical_cores({0, 1, 2, 3}, tmp_path) == 2
    assert host._physical_cores({0, 2}, tmp_path) == 1
    assert host._physical_cores({0, 3, 4, 5, 6}, tmp_path) == 5  # 5 and 6 are unknown: counted


def test_cpu_lists() -> None:
    assert host._parse_cpu_list("0,4-7") == {0, 4, 5, 6, 7}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_quota(tmp_path: Path, files: dict[str, str], expected: float | None) -> None:
    for name, text in files.items():
        write(tmp_path / name, text)
    assert host._cgroup_quota(tmp_path) == expected


def test_quota_limits_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_allowed_cpus", lambda: set(range(8)))
    monkeypatch.setattr(host, "_physical_cores", lambda cpus: len(cpus) // 2)
    monkeypatch.setattr(host, "_cgroup_quota", lambda: None)
    assert host.default_threads() == 4
    monkeypatch.setattr(host, "_cgroup_quota", lambda: 1.5)
    assert host.default_threads() == 2
    monkeypatch.setattr(host, "_cgroup_quota", lambda: 0.1)
    assert host.default_threads() == 1


def test_available_memory(tmp_path: Path) -> None:
    write(tmp_path / "meminfo", "MemTotal: 9 kB\nMemAvailable:   2048 kB\n")
    assert host.available_bytes(tmp_path / "meminfo", tmp_path) == 2 << 20
    write(tmp_path / "memory.max", "1000000\n")
    write(tmp_path / "memory.current", "400000\n")
    assert host.available_bytes(tmp_path / "meminfo", tmp_path) == 600_000
    write(tmp_path / "memory.max", "max\n")
    assert host.available_bytes(tmp_path / "meminfo", tmp_path) == 2 << 20
    assert host.available_bytes(tmp_path / "nothing", tmp_path / "nowhere") is None
