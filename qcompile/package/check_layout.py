"""The forbidden layouts: what must lie at the top of a contest package, once and under its exact name."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from qcompile.package.findings import INFERENCE, NOT_EXIST, PIP, Finding

MODEL, REQUIREMENTS, DEPENDENCIES, KERNELS = (
    "competition_model.py",
    "requirements.txt",
    "dependencies",
    "custom_kernels",
)
ZIP_NAME = "competition_submission.zip"
_PACKAGES = (".whl", ".gz", ".zip", ".tgz", ".bz2")
_NEAR = ("pip-requirements.txt", "pip_requirements.txt", "requirement.txt", "requirements-dev.txt")


def check_layout(root: Path, zip_name: str) -> list[Finding]:
    """Judge the names of an unpacked package."""
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))
    findings = []
    if zip_name and zip_name != ZIP_NAME:
        findings.append(Finding(zip_name, f"the judge takes the name {ZIP_NAME}", f"rename it to {ZIP_NAME}"))
    findings += _check_single(names, MODEL, NOT_EXIST)
    findings += _check_single(names, REQUIREMENTS, PIP)
    findings += _check_dependencies(root)
    findings += _check_kernels(root, names)
    return findings


def _check_single(names: Sequence[str], wanted: str, judge: str) -> list[Finding]:
    """A file that must be there once, at the top."""
    places = [name for name in names if PurePosixPath(name).name == wanted and not name.startswith("__MACOSX/")]
    if wanted not in places:
        if places:
            folder = places[0][: -len(wanted)]
            message = f"lies in the folder {folder} and not at the top of the zip"
            cure = f"zip from inside: `cd {folder.rstrip('/')} && zip -r ../{ZIP_NAME} *`"
            return [Finding(places[0], message, cure, judge)]
        near = next((n for n in names if n.lower() == wanted.lower() or (n in _NEAR and wanted == REQUIREMENTS)), None)
        if near is not None:
            return [Finding(near, f"the name must be exactly {wanted}", f"rename it to {wanted}", judge)]
        cure = "make the package with `qcompile package`" if wanted == MODEL else "list name==version of every wheel"
        return [Finding(wanted, "missing; is this the right zip?", cure, judge)]
    if len(places) > 1:
        others = ", ".join(place for place in places if place != wanted)
        return [Finding(others, f"a second {wanted}; exactly one is allowed", "delete or rename it", judge)]
    return []


def _check_dependencies(root: Path) -> list[Finding]:
    folder = root / DEPENDENCIES
    if not folder.is_dir():  # whether it is needed, `check_dependencies` knows
        return []
    return [
        Finding(path.relative_to(root).as_posix(), "no wheel or sdist; nothing else may lie here", "move it out", PIP)
        for path in sorted(folder.iterdir())
        if path.is_dir() or not path.name.endswith(_PACKAGES)
    ]


def _check_kernels(root: Path, names: Sequence[str]) -> list[Finding]:
    if not (root / KERNELS).is_dir():
        return []
    findings = [
        Finding(name, "only .run files at the top of custom_kernels/ are executed", f"move it to {KERNELS}/", INFERENCE)
        for name in names
        if name.startswith(f"{KERNELS}/") and name.endswith(".run") and name.count("/") > 1
    ]
    findings += [
        Finding(name, "wheels of operators are not installed from here", f"move it to {DEPENDENCIES}/ and list it", PIP)
        for name in names
        if name.startswith(f"{KERNELS}/") and name.endswith(".whl")
    ]
    if not findings and not any((root / KERNELS).glob("*.run")):
        findings.append(Finding(f"{KERNELS}/", "holds no .run file", f"put it in, or leave {KERNELS}/ out", INFERENCE))
    return findings
