"""Would the judge's pip install it? Every requirement has a wheel for that machine, and nothing is missing."""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from qcompile.errors import PackageError
from qcompile.package.check_layout import DEPENDENCIES, REQUIREMENTS
from qcompile.package.findings import PIP, Finding
from qcompile.package.platforms import JUDGE, WheelPlatform
from qcompile.package.wheels import Wheel, fits, missing_requirements, read_wheel

_MAX_REQUIREMENTS_BYTES = 1 << 20
# in the judge's image; its guide says to leave them out of requirements.txt
_IN_THE_IMAGE = frozenset({"torch", "torch-npu", "vllm", "vllm-ascend", "te", "hccl"})


def read_requirements(root: Path) -> tuple[list[Requirement], list[Finding]]:
    """Read requirements.txt: plain requirements, one a line; those that pip passes over on the judge's machine fall out."""
    path = root / REQUIREMENTS
    requirements: list[Requirement] = []
    findings: list[Finding] = []
    if not path.is_file() or path.stat().st_size > _MAX_REQUIREMENTS_BYTES:
        return [], [Finding(REQUIREMENTS, "missing or larger than 1 MiB", "list name==version, one a line", PIP)]
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        return [], [Finding(REQUIREMENTS, "not UTF-8 (written by PowerShell's `>`?)", "save it as UTF-8", PIP)]
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.split(" #")[0].strip()
        if not stripped or stripped.startswith("#"):
            continue
        where = f"{REQUIREMENTS}:{number}"
        try:
            requirement = Requirement(stripped)
        except InvalidRequirement:
            findings.append(Finding(where, f"'{stripped[:80]}' is no requirement", "write name==version", PIP))
            continue
        if requirement.url:
            cure = f"write {requirement.name}==VERSION and put its wheel into {DEPENDENCIES}/"
            findings.append(Finding(where, f"'{stripped[:80]}' names a place, not a version", cure, PIP))
        if requirement.marker is None or requirement.marker.evaluate(dict(JUDGE.environment())):
            requirement.marker = None
            requirements.append(requirement)
    return requirements, findings


def check_dependencies(root: Path, target: WheelPlatform) -> list[Finding]:
    """Judge `dependencies/` against requirements.txt for that machine."""
    requirements, findings = read_requirements(root)
    wheels: list[Wheel] = []
    for path in sorted((root / DEPENDENCIES).glob("*.whl")):
        name = f"{DEPENDENCIES}/{path.name}"
        try:
            wheel = read_wheel(path)
        except PackageError as error:
            findings.append(Finding(name, str(error), "download it again", PIP))
            continue
        wheels.append(wheel)
        if not fits(path, target) or not wheel.requires_python.contains(target.full_version):
            message = f"does not install on Python {target.full_version}, {target.machine}, glibc 2.{target.glibc[1]}"
            platforms = f"--platform manylinux_2_{target.glibc[1]}_{target.machine}"
            cure = f"`pip download {wheel.name} --only-binary=:all: {platforms} --python-version 3.9`"
            findings.append(Finding(name, message, cure, PIP))
    findings += _check_listed(requirements, wheels, root)
    if not findings:
        findings += [
            Finding(
                f"{DEPENDENCIES}/",
                f"lacks {wanted}, which {by} requires",
                f"add its wheel and list it in {REQUIREMENTS}",
                PIP,
            )
            for wanted, by in missing_requirements(wheels, target).items()
        ]
    return findings if findings or not requirements or _has_sdists(root) else _ask_pip(root, requirements, target)


def _check_listed(requirements: Sequence[Requirement], wheels: Sequence[Wheel], root: Path) -> list[Finding]:
    """Every requirement that applies has its wheel; a source archive is taken at its word."""
    sources = {canonicalize_name(path.name.rsplit("-", 1)[0]) for path in (root / DEPENDENCIES).glob("*.gz")}
    held: dict[str, list[Wheel]] = {}
    for wheel in wheels:
        held.setdefault(wheel.name, []).append(wheel)
    findings = []
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        if name in sources or any(
            requirement.specifier.contains(w.version, prereleases=True) for w in held.get(name, ())
        ):
            continue
        versions = ", ".join(str(wheel.version) for wheel in held.get(name, ()))
        message = f"'{requirement}' has no wheel in {DEPENDENCIES}/" + (
            f"; there is version {versions}" if versions else ""
        )
        cure = f"`pip download '{requirement}' -d {DEPENDENCIES}` for Python 3.9 on aarch64"
        if name in _IN_THE_IMAGE:
            cure = "take the line out: the judge's image has it"
        findings.append(Finding(REQUIREMENTS, message, cure, PIP))
    return findings


def _has_sdists(root: Path) -> bool:
    return any(path.suffix != ".whl" for path in (root / DEPENDENCIES).glob("*"))


def _ask_pip(root: Path, requirements: Sequence[Requirement], target: WheelPlatform) -> list[Finding]:
    """Pip's own resolver has the last word: it is asked for that machine, and installs nothing.

    It is given the requirements and not their file, whose markers it would read as this machine's.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-index", "--no-input"]
    command += ["--disable-pip-version-check", "--find-links", str(root / DEPENDENCIES), "--only-binary=:all:"]
    command += ["--implementation", "cp", "--python-version", target.full_version]
    for abi in (f"cp{target.python[0]}{target.python[1]}", "abi3", "none"):
        command += ["--abi", abi]
    for name in target.platforms:
        command += ["--platform", name]
    with tempfile.TemporaryDirectory(prefix="qcompile-pip-") as folder:
        command += ["--target", folder, "--", *map(str, requirements)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return []
    lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
    return [Finding(REQUIREMENTS, lines[-1].removeprefix("ERROR: ")[:300], "pin versions that agree", PIP)]
