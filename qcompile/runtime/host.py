"""What this process may use of its machine: physical cores and memory, as affinity and cgroups leave them."""

import math
import os
from pathlib import Path
from typing import FrozenSet, List, Optional, Set

_CPU_SYSFS = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")
# ONNX Runtime starts what it is asked for; a million never ends, and no signal stops it.
MAX_THREADS = 1024


def default_threads() -> int:
    """Return how many physical cores affinity and the cgroup's CPU quota leave to this process (>= 1)."""
    cpus = _allowed_cpus()
    cores = _physical_cores(cpus)
    quota = _cgroup_quota()
    if quota is not None:
        cores = min(cores, max(1, math.ceil(quota)))
    return max(1, cores)


def _allowed_cpus() -> Set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _physical_cores(cpus: Set[int], sysfs: Path = _CPU_SYSFS) -> int:
    """Count the cores behind logical CPUs; SMT siblings share one. Unknown topology counts every CPU."""
    cores: Set[FrozenSet[int]] = set()
    for cpu in cpus:
        topology = sysfs / f"cpu{cpu}" / "topology"
        text = _read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list")
        cores.add(frozenset(_parse_cpu_list(text)) if text else frozenset({cpu}))
    return len(cores)


def available_bytes(meminfo: Path = Path("/proc/meminfo"), root: Path = _CGROUP) -> Optional[int]:
    """Return the memory that can still be taken without swapping, or None where that cannot be known."""
    found = [int(line.split()[1]) << 10 for line in _read(meminfo).splitlines() if line.startswith("MemAvailable:")]
    for directory in _cgroup_directories(root):
        limit, used = _read(directory / "memory.max"), _read(directory / "memory.current")
        if limit.isdigit() and used.isdigit():
            found.append(max(0, int(limit) - int(used)))
    return min(found) if found else None


def _cgroup_quota(root: Path = _CGROUP) -> Optional[float]:
    """Return the CPU quota in cores (cgroup v2, then v1), or None when there is none."""
    quotas = []
    for directory in _cgroup_directories(root):
        fields = _read(directory / "cpu.max").split()
        if len(fields) == 2 and fields[0] != "max":
            quotas.append(float(fields[0]) / float(fields[1]))
    quota, period = _read(root / "cpu" / "cpu.cfs_quota_us"), _read(root / "cpu" / "cpu.cfs_period_us")
    if quota.isdigit() and period.isdigit():
        quotas.append(int(quota) / int(period))
    return min(quotas) if quotas else None


def _cgroup_directories(root: Path) -> List[Path]:
    """Return this process's cgroup v2 directory and all above it; in a container the root is its own."""
    own = [line[3:].strip("/") for line in _read(Path("/proc/self/cgroup")).splitlines() if line.startswith("0::")]
    leaf = root / own[0] if own else root
    return [d for d in (leaf, *leaf.parents) if d == root or root in d.parents]


def _parse_cpu_list(text: str) -> Set[int]:
    """Parse the kernel's list format: "0,4-7" is {0, 4, 5, 6, 7}."""
    cpus: Set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
