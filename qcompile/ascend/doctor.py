"""What this machine can do for Ascend: compile, run, or neither; and what to do about each gap."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from qcompile import __version__
from qcompile.ascend.cann_install import (
    CannInstall,
    ParserScan,
    find_cann,
    kernel_families,
    missing_python_packages,
    read_info,
    scan_parsers,
)
from qcompile.ascend.chips import cann_version, chips, nearest_cann
from qcompile.ascend.operators import Support, operator_table
from qcompile.errors import AtcError
from qcompile.runtime.host import available_bytes

_GOOD_COMPILE_BYTES = 8 << 30
_CHIP_ROW = re.compile(r"^\|\s*\d+\s+(?:Ascend)?(9\d{2}[A-Za-z0-9_\-]*|310[A-Za-z0-9]*)\s*\|", re.MULTILINE)
_SET_ENV = "source <toolkit>/set_env.sh, usually /usr/local/Ascend/ascend-toolkit/set_env.sh or .../cann/set_env.sh"


class Status(Enum):
    """How a check came out."""

    OK = "ok"
    GAP = "gap"  # something cannot be done here
    NOTE = "note"  # works, with a limit


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, how it came out, what was found, and what to do."""

    name: str
    status: Status
    found: str
    cure: str = ""

    def record(self) -> dict[str, str]:
        """Return plain data for JSON."""
        return {**asdict(self), "status": self.status.value}


@dataclass(frozen=True)
class Diagnosis:
    """All checks, and what follows from them.

    Attributes:
        checks: In the order of a build.
        abilities: What can be done here, in words.
        soc_versions: Chips of this machine, as --soc_version takes them.
        parsers: op type -> domains and opsets the installed parser libraries register.
    """

    checks: tuple[Check, ...]
    abilities: dict[str, bool]
    soc_versions: tuple[str, ...]
    parsers: Mapping[str, frozenset[tuple[str, int]]]

    def record(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "checks": [check.record() for check in self.checks],
            "abilities": self.abilities,
            "soc_versions": list(self.soc_versions),
            "parsers": {op: sorted(list(entry) for entry in found) for op, found in sorted(self.parsers.items())},
        }


def diagnose(environ: Mapping[str, str] | None = None, system: Path = Path("/")) -> Diagnosis:
    """Look at this machine, or at a tree that stands for one."""
    environ = os.environ if environ is None else environ
    install = find_cann(environ, system)
    scan = scan_parsers(install) if install is not None else ParserScan(())
    smi, soc_versions = _npu_smi(environ)
    acl = _acl(environ, install)
    checks = [_python(), _onnxruntime(), _memory(), *_cann(install), *_compiler(install, environ)]
    checks += [*_driver(install, system), smi, acl]
    checks += _parsers(install, scan)
    by_name = {check.name: check.status for check in checks}
    can_compile = by_name.get("atc") is Status.OK and by_name.get("environment") is Status.OK
    abilities = {
        "check and lower for Ascend": True,
        "run on the CPU": by_name["onnxruntime"] is Status.OK,
        "simulate an Ascend device": by_name["onnxruntime"] is Status.OK,
        "compile .om files": can_compile,
        "run .om files": by_name["acl"] is Status.OK and bool(soc_versions),
    }
    return Diagnosis(tuple(checks), abilities, soc_versions, scan.operators)


def _python() -> Check:
    return Check("qcompile", Status.OK, f"{__version__} on Python {platform.python_version()}, {platform.machine()}")


def _onnxruntime() -> Check:
    try:
        import onnxruntime

        providers = ", ".join(onnxruntime.get_available_providers())
        return Check("onnxruntime", Status.OK, f"{onnxruntime.__version__}: {providers}")
    except (ImportError, OSError) as error:
        return Check("onnxruntime", Status.GAP, str(error).splitlines()[0], "pip install onnxruntime")


def _memory() -> Check:
    free = available_bytes()
    if free is None:
        return Check("memory", Status.NOTE, "not known on this system")
    found = f"{free / (1 << 30):.1f} GiB available, {os.cpu_count()} CPUs"
    if free < _GOOD_COMPILE_BYTES:
        cure = (
            "ATC wants about 2 GiB plus three times the weights (an estimate): build one bucket at a time, or add swap"
        )
        return Check("memory", Status.NOTE, found, cure)
    return Check("memory", Status.OK, found)


def _cann(install: CannInstall | None) -> list[Check]:
    if install is None:
        cure = "`qcompile atc` then prepares a folder with build_om.sh for a machine that has CANN"
        return [Check("CANN", Status.GAP, "not found", cure)]
    where = f" in {install.home}" if install.home else ""
    if not install.version:
        cure = "set ASCEND_TOOLKIT_HOME to the toolkit's directory"
        return [Check("CANN", Status.NOTE, f"release not known{where}", cure)]
    try:
        _, warning = nearest_cann(cann_version(install.version))
    except AtcError:
        warning = f"'{install.version}' is not a release the tables can place"
    status = Status.NOTE if warning else Status.OK
    return [Check("CANN", status, f"{install.version}{where}", warning or "")]


def _compiler(install: CannInstall | None, environ: Mapping[str, str]) -> list[Check]:
    if install is None or install.atc is None:
        return [Check("atc", Status.GAP, "not found", "install the CANN toolkit, or compile elsewhere")]
    checks = [Check("atc", Status.OK, str(install.atc))]
    if install.is_sourced:
        checks.append(Check("environment", Status.OK, f"ASCEND_OPP_PATH={environ.get('ASCEND_OPP_PATH', '')}"))
    else:
        cure = f"source {install.set_env}" if install.set_env else _SET_ENV
        checks.append(Check("environment", Status.GAP, "set_env.sh was not sourced", cure))
    missing = missing_python_packages(environ)
    if missing is None:
        checks.append(Check("python of CANN", Status.GAP, "no python3 on PATH", "install Python 3.7.5 to 3.11"))
    elif missing:
        cure = f"pip install {' '.join(missing)} (into the python3 on PATH)"
        checks.append(Check("python of CANN", Status.GAP, f"missing: {', '.join(missing)}", cure))
    else:
        checks.append(Check("python of CANN", Status.OK, "all packages there"))
    families = kernel_families(install)
    if families:
        checks.append(Check("kernels", Status.OK, ", ".join(families)))
    else:
        cure = "install the operator package of your chip; from CANN 8.5 on it is a package of its own"
        checks.append(Check("kernels", Status.GAP, "no chip's kernels found", cure))
    return checks


def _driver(install: CannInstall | None, system: Path) -> list[Check]:
    path = system / "usr/local/Ascend/driver/version.info"
    match = re.search(r"^Version=(\S+)", read_info(path), re.MULTILINE)
    if match:
        return [Check("driver", Status.OK, match.group(1))]
    if install is not None and install.has_driver:
        return [Check("driver", Status.NOTE, "installed, version not known")]
    if install is not None and install.devlib is not None:
        found = "none; compiling works with the stubs in devlib"
        return [Check("driver", Status.NOTE, found, f"export LD_LIBRARY_PATH={install.devlib}:$LD_LIBRARY_PATH")]
    cure = "install the NPU driver to run; to compile only, add <toolkit>/<arch>-linux/devlib to LD_LIBRARY_PATH"
    return [Check("driver", Status.GAP, "not found", cure)]


def _npu_smi(environ: Mapping[str, str]) -> tuple[Check, tuple[str, ...]]:
    tool = shutil.which("npu-smi", path=environ.get("PATH", ""))
    if tool is None:
        return Check(
            "npu-smi", Status.GAP, "not found", "comes with the NPU driver; without an NPU nothing runs here"
        ), ()
    try:
        done = subprocess.run(
            [tool, "info"], env=dict(environ), capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return Check("npu-smi", Status.GAP, f"{tool}: {error}", "check the driver"), ()
    names = _CHIP_ROW.findall(done.stdout)
    if not names:
        last = next((line for line in reversed((done.stdout + done.stderr).splitlines()) if line.strip()), "no output")
        cure = "check that this user may use the NPU (group HwHiAiUser, container started with the davinci devices)"
        return Check(
            "npu-smi", Status.GAP, f"lists no chip (exit code {done.returncode}): {last.strip()[:120]}", cure
        ), ()
    soc_versions = tuple(dict.fromkeys(f"Ascend{name}" for name in names))
    known = all(name.lower() in chips() for name in soc_versions)
    found = f"{len(names)} x {', '.join(soc_versions)}"
    if known:
        return Check("npu-smi", Status.OK, found), soc_versions
    listed = ", ".join(chip.name for chip in chips().values())
    return Check("npu-smi", Status.NOTE, found, f"the tables know {listed}"), soc_versions


def machine_chips(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the kinds of chip npu-smi lists, as --soc_version takes them."""
    return _npu_smi(environ)[1]


def _acl(environ: Mapping[str, str], install: CannInstall | None) -> Check:
    roots = [Path(entry) for entry in environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if install is not None and install.home is not None:
        roots.append(install.home / "python/site-packages")
    on_path = [root for root in roots[: len(roots)] if _has_acl(root)]
    if importlib.util.find_spec("acl") is not None or (on_path and str(on_path[0]) in environ.get("PYTHONPATH", "")):
        return Check("acl", Status.OK, "Python module found")
    if on_path:
        return Check("acl", Status.GAP, f"in {on_path[0]}, not on PYTHONPATH", _SET_ENV)
    return Check("acl", Status.GAP, "no Python module", "comes with CANN's toolkit or nnrt; then source set_env.sh")


def _has_acl(root: Path) -> bool:
    return (root / "acl").is_dir() or any(root.glob("acl*.so"))


def _parsers(install: CannInstall | None, scan: ParserScan) -> list[Check]:
    if install is None:
        return []
    if not scan.libraries:
        cure = "ATC needs opp/built-in/framework/onnx/*.so: install the operator package"
        return [Check("ONNX parsers", Status.GAP, "no parser library found", cure)]
    table = operator_table()
    wanted = [op for op in table if op.is_detailed and not op.avoid]
    there = sorted(op.name for op in wanted if op.name in scan.operators)
    missing = sorted(op.name for op in wanted if op.name not in scan.operators)
    cut = "" if scan.is_complete else " (the scan was cut short)"
    names = ", ".join(path.name for path in scan.libraries[:4])
    checks = [Check("ONNX parsers", Status.OK, f"{len(scan.operators)} operators in {names}{cut}")]
    checks.append(Check("NPU operators", Status.OK if there else Status.GAP, ", ".join(there) or "none"))
    if missing:
        likely = [name for name in missing if _is_promised(install, name)]
        found = ", ".join(missing) + (f"; the table promised {', '.join(likely)}" if likely else "")
        checks.append(Check("not registered", Status.NOTE, found, "do not emit them for this machine, or update CANN"))
    return checks


def _is_promised(install: CannInstall, name: str) -> bool:
    operator = operator_table().get(name)
    try:
        release, _ = nearest_cann(cann_version(install.version))
    except AtcError:
        return False
    return operator is not None and operator.support(release) is Support.CERTAIN
