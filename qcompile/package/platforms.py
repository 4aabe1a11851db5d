"""The machines wheels are wanted for: the judge's, and this one."""

import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from packaging import tags
from packaging.markers import default_environment

_GLIBC_FIRST = {"aarch64": (2, 17), "x86_64": (2, 5)}
_LEGACY = {(2, 17): "manylinux2014", (2, 12): "manylinux2010", (2, 5): "manylinux1"}


@dataclass(frozen=True)
class WheelPlatform:
    """A Python on a machine.

    Attributes:
        python: Its version, major and minor.
        machine: As `uname -m` says.
        glibc: The C library's version; wheels may ask for it or an older one.
    """

    python: tuple[int, int]
    machine: str
    glibc: tuple[int, int]

    @property
    def name(self) -> str:
        """Short, for messages and folders."""
        return f"cp{self.python[0]}{self.python[1]}-{self.machine}"

    @property
    def full_version(self) -> str:
        """A whole version of that Python; the judge's is 3.9.10."""
        return f"{self.python[0]}.{self.python[1]}.10"

    @property
    def platforms(self) -> list[str]:
        """Platform tags, newest C library first (PEP 600), the old names (PEP 513, 571, 599) among them."""
        names = []
        first = _GLIBC_FIRST.get(self.machine, (2, 17))
        for minor in range(self.glibc[1], first[1] - 1, -1):
            names.append(f"manylinux_2_{minor}_{self.machine}")
            if (2, minor) in _LEGACY:
                names.append(f"{_LEGACY[2, minor]}_{self.machine}")
        return [*names, f"linux_{self.machine}"]

    def tags(self) -> frozenset[tags.Tag]:
        """Every wheel tag that installs here."""
        supported = [*tags.cpython_tags(self.python, platforms=self.platforms)]
        supported += tags.compatible_tags(self.python, f"cp{self.python[0]}{self.python[1]}", self.platforms)
        return frozenset(supported)

    def environment(self) -> Mapping[str, str]:
        """What environment markers (PEP 508) see."""
        version = f"{self.python[0]}.{self.python[1]}"
        return {
            **{key: str(value) for key, value in default_environment().items()},
            "python_version": version,
            "python_full_version": self.full_version,
            "implementation_version": self.full_version,
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
            "platform_machine": self.machine,
            "platform_system": "Linux",
            "sys_platform": "linux",
            "os_name": "posix",
            "extra": "",
        }


# pytorch_2.1.0-cann_8.0.rc2-py_3.9-euler_2.10.7-aarch64-snt9b; EulerOS 2.10 has glibc 2.28
JUDGE = WheelPlatform((3, 9), "aarch64", (2, 28))


def this_machine() -> WheelPlatform:
    """This interpreter on this machine."""
    numbers = platform.libc_ver()[1].split(".")
    glibc = (int(numbers[0]), int(numbers[1])) if len(numbers) >= 2 and numbers[1].isdigit() else (2, 17)
    return WheelPlatform((sys.version_info[0], sys.version_info[1]), platform.machine(), glibc)
