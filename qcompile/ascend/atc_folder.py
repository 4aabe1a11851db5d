"""A folder to copy to the machine that has CANN: graphs, weights, tokenizer, and `build_om.sh`."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from importlib import resources
from pathlib import Path

from qcompile.ascend import atc_manifest
from qcompile.ascend.atc_jobs import Build, Job
from qcompile.errors import AtcError
from qcompile.runtime.manifest import MANIFEST_NAME, Manifest
from qcompile.staging import claim_staging, discard_stale, release_staging

SCRIPT_NAME = "build_om.sh"
_FINISH_NAME = "finish_manifest.py"


def prepare_folder(build: Build, folder: Path) -> Path:
    """Write the folder, complete or not at all; one that this function wrote before is replaced.

    What `build_om.sh` finished in that one of the same graphs, with the same flags, goes over: it took ATC minutes or hours.

    Raises:
        AtcError: Something else is in the way, or it cannot be written.
    """
    final = Path(os.path.abspath(folder))
    if final.exists() and not (final / SCRIPT_NAME).is_file() and not _is_empty(final):
        raise AtcError(f"{final}: is in the way; choose another -o (only a folder with {SCRIPT_NAME} is replaced)")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        discard_stale(final)
        staged, lock = claim_staging(final)
    except OSError as error:
        raise AtcError(f"{final}: cannot be written: {error.strerror or error}") from error
    try:
        _fill(build, staged)
        _keep_finished(build, final, staged)
        _move(staged, final)
    except OSError as error:
        raise AtcError(
            f"{final}: cannot be written: {error.strerror or error}; free some space; nothing half-written is left"
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        release_staging(lock)
    return final


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _fill(build: Build, folder: Path) -> None:
    names = {name for job in build.jobs for name in (job.graph, *job.data)}
    if build.manifest is not None:
        names |= _plain_files(build.manifest)
        manifest = json.loads((build.directory / MANIFEST_NAME).read_text(encoding="utf-8"))
        text = json.dumps(atc_manifest.uncompiled(manifest), indent=1, ensure_ascii=False)
        (folder / MANIFEST_NAME).write_text(f"{text}\n", encoding="utf-8")
    for name in sorted(names):
        _link_or_copy(build.directory / name, folder / name)
    (folder / _FINISH_NAME).write_text(Path(atc_manifest.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    script = folder / SCRIPT_NAME
    script.write_text(build_script(build), encoding="utf-8")
    script.chmod(0o755)


def _keep_finished(build: Build, old: Path, folder: Path) -> None:
    for job in build.jobs:
        record = atc_manifest.read_record(str(old), job.name)
        if record is None or record["key"] != job.key:
            continue
        work = Path(atc_manifest.WORK_FOLDER, job.name, atc_manifest.RECORD_NAME)
        for name in (record["om"], *record["weights"], work):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if not (folder / name).exists():  # weights are shared
                _link_or_copy(old / name, folder / name)


def _plain_files(manifest: Manifest) -> set[str]:
    return {entry.name for entry in manifest.files if Path(entry.name).name == entry.name}


def _link_or_copy(source: Path, target: Path) -> None:
    """Weights are linked where the file system allows: both names show the same bytes, and nobody writes in place."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)


def _move(staged: Path, final: Path) -> None:
    if final.exists():
        retired = staged.with_name(f"{staged.name}.old")
        final.replace(retired)
        staged.replace(final)
        shutil.rmtree(retired, ignore_errors=True)
    else:
        staged.replace(final)


def build_script(build: Build) -> str:
    """Return build_om.sh; unless a host CPU was asked for, it compiles for the machine that it runs on."""
    text = resources.files("qcompile.ascend").joinpath(SCRIPT_NAME).read_text(encoding="utf-8")
    lines = [_line(job, build.host_cpu) for job in build.jobs]
    cpu = build.host_cpu if build.is_host_cpu_given else '"$(uname -m)"'
    memory = max(job.memory_bytes for job in build.jobs) >> 20
    replaced = {"SOC": build.chip.name, "CPU": cpu, "MEMORY": str(memory), "JOBS": "\n".join(lines)}
    for word, value in replaced.items():
        text = text.replace(f"@{word}@", value)
    return text


def _line(job: Job, host_cpu: str) -> str:
    words = ["build", job.name, job.key, *job.arguments]
    composed = f"--host_env_cpu={host_cpu}"
    return " ".join('--host_env_cpu="$host_cpu"' if word == composed else shlex.quote(word) for word in words)
