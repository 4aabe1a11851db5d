"""Find CANN on this machine: its home, release, compiler, environment, and what its ONNX parsers register.

Everything is looked up below `system`, so that tests build a small tree instead of a machine.
"""

from __future__ import annotations

import mmap
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

_ROOTS = ("usr/local/Ascend", "opt/Ascend")
_INFO_BYTES = 64 << 10
_VERSION_FILES = (
    "*-linux/ascend_toolkit_install.info",
    "ascend_toolkit_install.info",
    "version.cfg",
    "toolkit/version.info",
    "compiler/version.info",
    "opp/version.info",
    "version.info",
)
_SCAN_BYTES = 1 << 30
_MAX_LIBRARIES = 64
_MAX_NAMES = 20_000
_REGISTRATION = re.compile(rb"::(\d{1,2})::([A-Za-z]\w{1,80})")  # after the domain: starts with a literal, scans fast
_DOMAIN = re.compile(rb"[A-Za-z][\w.]{1,30}\Z")
_VERSION = re.compile(r"(?:^|:|=|V)\s*\[?(\d{1,2}\.\d{1,2}(?:\.[A-Za-z0-9]+)*)", re.MULTILINE)
# Import name -> package of what CANN's operator compiler needs in its python3.
PYTHON_PACKAGES = {
    "numpy": "numpy", "decorator": "decorator", "sympy": "sympy", "attr": "attrs", "psutil": "psutil",
    "cloudpickle": "cloudpickle", "ml_dtypes": "ml-dtypes", "tornado": "tornado", "absl": "absl-py", "scipy": "scipy",
}  # fmt: skip


@dataclass(frozen=True)
class CannInstall:
    """One installation of CANN.

    Attributes:
        home: The toolkit's directory, or None when only an atc is on PATH.
        version: Its release as it writes it, such as 8.1.RC1; "" when no file says.
        atc: The compiler, or None.
        atc_on_path: Whether the shell would find it.
        set_env: The script that sets its environment, or None.
        is_sourced: Whether that was done in this process.
        opp: The operator package, or None.
        devlib: Stub libraries for a host without driver, or None.
        has_driver: Whether the NPU driver's libraries are installed.
    """

    home: Path | None
    version: str
    atc: Path | None
    atc_on_path: bool
    set_env: Path | None
    is_sourced: bool
    opp: Path | None
    devlib: Path | None
    has_driver: bool


@dataclass(frozen=True)
class ParserScan:
    """What the ONNX parser libraries register.

    Attributes:
        libraries: Files that were read.
        operators: op type -> domains and opsets under which it is registered.
        is_complete: False when a limit cut the scan short.
    """

    libraries: tuple[Path, ...]
    operators: Mapping[str, frozenset[tuple[str, int]]] = field(default_factory=dict)
    is_complete: bool = True


def find_cann(environ: Mapping[str, str] | None = None, system: Path = Path("/")) -> CannInstall | None:
    """Return the installation that the environment names, else the newest found in the usual places, else None."""
    environ = os.environ if environ is None else environ
    on_path = shutil.which("atc", path=environ.get("PATH", ""))
    home = next((path for path in _homes(environ, system, on_path) if path.is_dir()), None)
    if home is None and on_path is None:
        return None
    atc = Path(on_path) if on_path else _first(home, ("bin/atc", "compiler/bin/atc", "*-linux/bin/atc", "atc/bin/atc"))
    opp_path = environ.get("ASCEND_OPP_PATH", "")
    opp = Path(opp_path) if opp_path and Path(opp_path).is_dir() else _first(home, ("opp",))
    return CannInstall(
        home=home,
        version=_version(home),
        atc=atc,
        atc_on_path=on_path is not None,
        set_env=_set_env(home),
        is_sourced=on_path is not None and bool(opp_path),
        opp=opp,
        devlib=_first(home, (f"{platform.machine()}-linux/devlib", "*-linux/devlib", "devlib")),
        has_driver=(system / "usr/local/Ascend/driver/lib64").is_dir(),
    )


def _homes(environ: Mapping[str, str], system: Path, on_path: str | None) -> Iterator[Path]:
    for name in ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH"):
        if environ.get(name):
            yield Path(environ[name])
    if on_path is not None:
        real = Path(os.path.realpath(on_path))
        yield from (parent for parent in real.parents if (parent / "opp").is_dir())
    roots = [system / root for root in _ROOTS]
    if environ.get("HOME"):
        roots.append(Path(environ["HOME"]) / "Ascend")
    for root in roots:
        yield root / "ascend-toolkit/latest"
        yield root / "cann"
        yield from sorted(root.glob("cann-*"), reverse=True)
        yield from sorted(root.glob("ascend-toolkit/[0-9]*"), reverse=True)


def _first(home: Path | None, patterns: tuple[str, ...]) -> Path | None:
    if home is None:
        return None
    return next((path for pattern in patterns for path in sorted(home.glob(pattern))), None)


def _set_env(home: Path | None) -> Path | None:
    if home is None:
        return None
    candidates = (home / "set_env.sh", home.parent / "set_env.sh", home / "bin/setenv.bash")
    return next((path for path in candidates if path.is_file()), None)


def _version(home: Path | None) -> str:
    """Read the release from the files each installer leaves, else from the directory's name."""
    if home is None:
        return ""
    for pattern in _VERSION_FILES:
        for path in sorted(home.glob(pattern))[:4]:
            found = _version_in(read_info(path))
            if found:
                return found
    name = Path(os.path.realpath(home)).name
    match = re.search(r"(\d{1,2}\.\d{1,2}(?:\.[A-Za-z0-9]+)*)", name)
    return match.group(1) if match else ""


def _version_in(text: str) -> str:
    for key in ("version_dir=", "version="):
        for line in text.splitlines():
            if line.lower().startswith(key):
                match = _VERSION.search("=" + line.split("=", 1)[1])
                if match:
                    return match.group(1)
    match = re.search(r"running_version=\[[^\]:]*:([\w.]+)\]", text)
    return match.group(1) if match else ""


def read_info(path: Path) -> str:
    """Return the text of a small information file, or ""."""
    try:
        with path.open("rb") as stream:
            return stream.read(_INFO_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""


def missing_python_packages(environ: Mapping[str, str] | None = None) -> list[str] | None:
    """Return the packages CANN's compiler would not find in python3; None when python3 cannot be asked."""
    environ = os.environ if environ is None else environ
    python = shutil.which("python3", path=environ.get("PATH", ""))
    if python is None:
        return None
    code = f"import importlib.util as u; print(*[n for n in {list(PYTHON_PACKAGES)!r} if u.find_spec(n) is None])"
    try:
        done = subprocess.run(
            [python, "-c", code], env=dict(environ), capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return [PYTHON_PACKAGES[name] for name in done.stdout.split() if name in PYTHON_PACKAGES]


def kernel_families(install: CannInstall) -> list[str]:
    """Return the chip families whose kernels are installed: ascend910b, ascend310p, ..."""
    if install.opp is None:
        return []
    found: set[str] = set()
    for pattern in ("built-in/op_impl/ai_core/tbe/config/ascend*", "built-in/op_impl/ai_core/tbe/kernel/ascend*"):
        found.update(path.name for path in install.opp.glob(pattern) if path.is_dir())
    return sorted(found)


def scan_parsers(install: CannInstall) -> ParserScan:
    """Read which operators the ONNX parser libraries register, from the strings in them."""
    if install.opp is None:
        return ParserScan(())
    patterns = ("built-in/framework/onnx/*.so", "vendors/*/framework/onnx/*.so")
    libraries = [path for pattern in patterns for path in sorted(install.opp.glob(pattern)) if path.is_file()]
    operators: dict[str, set[tuple[str, int]]] = {}
    is_complete = len(libraries) <= _MAX_LIBRARIES
    for library in libraries[:_MAX_LIBRARIES]:
        is_complete &= _scan_library(library, operators)
    return ParserScan(
        tuple(libraries[:_MAX_LIBRARIES]), {op: frozenset(found) for op, found in operators.items()}, is_complete
    )


def _scan_library(path: Path, operators: dict[str, set[tuple[str, int]]]) -> bool:
    """Add the registrations found in one file; mapped, so memory does not follow its size."""
    try:
        size_bytes = path.stat().st_size
        if size_bytes == 0:
            return True
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for match in _REGISTRATION.finditer(data, 0, min(size_bytes, _SCAN_BYTES)):
                before = _DOMAIN.search(data[max(0, match.start() - 32) : match.start()])
                if len(operators) >= _MAX_NAMES:
                    return False
                if before is not None:
                    domain, op = before.group().decode(), match.group(2).decode()
                    operators.setdefault(op, set()).add(("" if domain == "ai.onnx" else domain, int(match.group(1))))
    except OSError:
        return False
    return size_bytes <= _SCAN_BYTES
