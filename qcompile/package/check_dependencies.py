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
from qcompile.package.requirement_lines import requirement_lines
from qcompile.package.requirement_options import line_finding
from qcompile.package.wheels import Wheel, fits, missing_requirements, read_wheel
from qcompile.runtime.manifest import sha256_of

# in the judge's image; its guide says to leave them out of requirements.txt
_IN_THE_IMAGE = frozenset({"torch", "torch-npu", "vllm", "vllm-ascend", "te", "hccl"})


def read_requirements(root: Path) -> tuple[list[Requirement], list[Finding]]:
    """Read requirements.txt and the files it names with -r; those that pip passes over on the judge's machine fall out."""
    requirements: list[Requirement] = []
    findings: list[Finding] = []
    lines = requirement_lines(root, REQUIREMENTS, findings)
    has_hashes = any(sha256 for _, _, sha256 in lines)
    for where, text, sha256 in lines:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            findings.append(line_finding(where, text))
            continue
        if requirement.url:
            cure = f"write {requirement.name}==VERSION and put its wheel into {DEPENDENCIES}/"
            findings.append(Finding(where, f"'{text[:80]}' names a place, not a version", cure, PIP))
        if requirement.marker is None or requirement.marker.evaluate(dict(JUDGE.environment())):
            requirement.marker = None
            requirements.append(requirement)
            if has_hashes and not requirement.url:
                findings += _check_hashes(root, where, requirement, sha256)
    return requirements, findings


def _check_hashes(root: Path, where: str, requirement: Requirement, sha256: frozenset[str]) -> list[Finding]:
    """Once one line has a `--hash`, pip wants one for all, and takes no file of another digest."""
    if not sha256:
        message = f"'{requirement}' has no --hash=sha256:..., but another line has one: pip wants it for all or none"
        return [Finding(where, message, "take the --hash of the others out", PIP)]
    name = canonicalize_name(requirement.name)
    files = [path for path in _files(root) if canonicalize_name(_project(path)) == name]
    if not files or any(sha256_of(path) in sha256 for path in files):
        return []
    cure = "bring the file that was meant, or take the --hash out"
    return [Finding(where, f"no file of '{requirement}' in {DEPENDENCIES}/ has a sha256 that is named", cure, PIP)]


def _files(root: Path) -> list[Path]:
    return [path for path in sorted((root / DEPENDENCIES).glob("*")) if path.is_file()]


def _project(path: Path) -> str:
    return path.name.split("-")[0] if path.suffix == ".whl" else path.name.rsplit("-", 1)[0]


def check_dependencies(root: Path, target: WheelPlatform) -> list[Finding]:
    """Judge `dependencies/` against requirements.txt for that machine."""
    requirements, findings = read_requirements(root)
    if requirements and not (root / DEPENDENCIES).is_dir():
        cure = f"`pip download -r {REQUIREMENTS} -d {DEPENDENCIES}` for Python 3.9 on aarch64"
        message = f"missing, but {REQUIREMENTS} lists {len(requirements)} packages"
        return [*findings, Finding(f"{DEPENDENCIES}/", message, cure, PIP)]
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
