"""What the figures were taken on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from qcompile import __version__
from qcompile.runtime.host import available_bytes, default_threads

_BUSY_SHARE = 0.25


def describe_machine(threads: int) -> dict[str, Any]:
    """Return processor, cores, free memory, load, and the versions that matter."""
    return {
        "cpu": _cpu_name(),
        "cores": default_threads(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "available_bytes": available_bytes(),
        "load_average": load_average(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "onnxruntime": onnxruntime.__version__,
        "qcompile": __version__,
    }


def load_average() -> float | None:
    """Return how many processes wanted a core during the last minute, or None where the system does not say."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def busy_warning(load: float | None, cores: int) -> str | None:
    """Say that others use this machine, when they do."""
    if load is None or load <= _BUSY_SHARE * cores:
        return None
    return f"load average {load:.1f} on {cores} cores: other work is running, the times are too high and noisy"


def _cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
