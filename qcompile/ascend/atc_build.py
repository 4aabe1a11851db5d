"""One build with CANN on this machine: the compiler and its environment, the jobs, the manifest at the end."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qcompile.artifact import find_manifest
from qcompile.ascend.atc_jobs import Build, compile_environment, compile_settings
from qcompile.ascend.atc_manifest import WORK_FOLDER, finish
from qcompile.ascend.atc_run import Say, run_jobs
from qcompile.ascend.cann_install import CannInstall, missing_python_packages
from qcompile.ascend.chips import Cann, Chip, chip_named
from qcompile.ascend.doctor import machine_chips
from qcompile.ascend.sim.atc import RELEASE_VARIABLE
from qcompile.errors import AtcError
from qcompile.runtime.host import available_bytes
from qcompile.runtime.manifest import MANIFEST_NAME


@dataclass(frozen=True)
class Outcome:
    """What a build made: .om by graph, in `directory`; whether a manifest lists them."""

    directory: Path
    oms: dict[str, str]
    has_manifest: bool


def target_chip(path: Path, soc_version: str | None) -> Chip:
    """Return the chip to compile for: the one given, the manifest's target, or this machine's only one.

    Raises:
        AtcError: There is no such file, or none of them says.
        ManifestError: The manifest is damaged.
    """
    if soc_version:
        return chip_named(soc_version)
    if not path.exists():
        raise AtcError(f"{path}: no such file or directory")
    manifest = find_manifest(path)
    if manifest is not None and manifest.target.startswith("ascend"):
        return chip_named(manifest.target)
    found = machine_chips(os.environ)
    if len(found) == 1:
        return chip_named(found[0])
    seen = f"npu-smi lists {', '.join(found)}" if found else "there is no NPU here to ask"
    raise AtcError(f"{path}: which chip? {seen}; give --soc-version Ascend910B4 (the Name column of npu-smi info)")


def find_compiler(install: CannInstall, environ: Mapping[str, str]) -> tuple[str, list[str]]:
    """Return atc, and notes on what its environment lacks.

    Raises:
        AtcError: CANN is installed but its environment was not set.
    """
    if install.atc is None or not install.atc_on_path:
        script = install.set_env or "its set_env.sh"
        raise AtcError(
            f"CANN {install.version or ''} is in {install.home}, but its environment is not set; run `source {script}` in "
            "this shell and try again"
        )
    notes = []
    if not install.is_sourced:
        notes.append(
            f"ASCEND_OPP_PATH is not set: `source {install.set_env or 'set_env.sh of CANN'}` if ATC misses operators"
        )
    missing = missing_python_packages(environ)
    if missing is None:
        notes.append("no python3 on PATH: CANN's operator compiler needs one")
    elif missing:
        notes.append(f"python3 lacks packages of CANN's operator compiler: pip install {' '.join(missing)}")
    if not install.has_driver and install.home is not None:
        stubs = (
            f"the stubs in {install.devlib} are used" if install.devlib else "and no devlib with stubs was found either"
        )
        notes.append(f"no NPU driver on this machine; {stubs}")
    return str(install.atc), notes


def build_oms(build: Build, atc: str, install: CannInstall, environ: Mapping[str, str], say: Say) -> Outcome:
    """Compile what is not finished, then write the manifest.

    Raises:
        AtcError: A graph failed, or the result cannot be written; finished graphs are kept for the next run.
    """
    at_once, workers = compile_settings(build.jobs, available_bytes(), os.cpu_count() or 1)
    environment = compile_environment(environ, workers)
    if not install.has_driver and install.devlib is not None:
        known = environment.get("LD_LIBRARY_PATH", "")
        if str(install.devlib) not in known.split(os.pathsep):
            environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, (str(install.devlib), known)))
    oms = run_jobs(build.jobs, [atc], environment, at_once=at_once, say=say)
    about = {"soc_version": build.chip.name, "cann_version": install.version, "host_cpu": build.host_cpu}
    return _entered(build, oms, about)


def simulate_oms(build: Build, cann: Cann, environ: Mapping[str, str], say: Say) -> Outcome:
    """Do the same with the stand-in for ATC: the files hold the graphs and say that they are simulated.

    Raises:
        AtcError: A graph is refused, or the result cannot be written.
    """
    environment = {**environ, RELEASE_VARIABLE: str(cann)}
    root = str(Path(__file__).parents[2])  # and not the model's directory, where it is started
    start = (
        f"import sys; sys.path[:1] = [{root!r}]; from qcompile.ascend.sim.atc import main; sys.exit(main(sys.argv[1:]))"
    )
    # a real compiler must not take these for its own finished work, nor the other way round
    jobs = [replace(job, key=f"simulated {cann} {job.key}") for job in build.jobs]
    oms = run_jobs(jobs, [sys.executable, "-c", start], environment, at_once=min(4, os.cpu_count() or 1), say=say)
    about = {"soc_version": build.chip.name, "cann_version": str(cann), "host_cpu": build.host_cpu, "simulated": True}
    return _entered(build, oms, about)


def _entered(build: Build, oms: dict[str, str], about: dict[str, Any]) -> Outcome:
    if build.manifest is None:
        return Outcome(build.directory, oms, has_manifest=False)
    try:
        finish(str(build.directory), about)
    except (OSError, ValueError, KeyError) as error:
        raise AtcError(f"{build.directory / MANIFEST_NAME}: cannot be written: {error}") from error
    return Outcome(build.directory, oms, has_manifest=True)


def copy_build(build: Build, output: Path) -> Build:
    """Return the same build in another directory, which gets links to (or copies of) graphs, weights and tokenizer.

    Raises:
        AtcError: It cannot be written.
    """
    names = {name for job in build.jobs for name in (job.graph, *job.data)}
    if build.manifest is not None:
        names |= {MANIFEST_NAME, *(entry.name for entry in build.manifest.files)}
    target = Path(os.path.abspath(output))
    is_ours = any((target / name).exists() for name in (MANIFEST_NAME, WORK_FOLDER))
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not is_ours):
        raise AtcError(f"{target}: is in the way; choose another -o (only what qcompile wrote is overwritten)")
    try:
        (target / WORK_FOLDER).mkdir(parents=True, exist_ok=True)
        for name in sorted(names):
            _place(build.directory / name, target / name)
    except OSError as error:
        raise AtcError(
            f"{target}: cannot be written: {error.strerror or error}; free space or choose another -o"
        ) from error
    return replace(build, directory=target, jobs=tuple(replace(job, directory=target) for job in build.jobs))


def _place(source: Path, target: Path) -> None:
    if target.exists() and target.samefile(source):
        return
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(os.path.realpath(source), temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    temporary.replace(target)
