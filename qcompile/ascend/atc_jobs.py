"""What `qcompile atc` builds: one job per graph, with its command line, its key, and an estimate of the memory it takes."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qcompile.ascend.atc_manifest import WORK_FOLDER
from qcompile.ascend.atc_options import Invocation, compose, options_of, tensor_bytes, weight_bytes
from qcompile.ascend.chips import Cann, Chip
from qcompile.ascend.inputs import onnx_graphs
from qcompile.ascend.legality.check import Parsers, check_model
from qcompile.ascend.legality.finding import Report
from qcompile.ascend.legality.onnx_file import read_onnx
from qcompile.ascend.legality.view import GraphView
from qcompile.ascend.plugins import METADATA_KEY, plugins_named_in
from qcompile.errors import AtcError
from qcompile.runtime.manifest import MANIFEST_NAME, Manifest, sha256_of

# Estimates: ATC itself, what it holds per byte of weights, and one process of the kernel compiler.
_BASE_BYTES = 2 << 30
_WEIGHT_FACTOR = 3
_WORKER_BYTES = 3 << 29
_MAX_WORKERS = 32


@dataclass(frozen=True)
class Job:
    """One graph to compile.

    Attributes:
        name: The graph's file without its ending; also the name of the .om.
        directory: Where the graph lies; ATC runs there, with relative names.
        graph: The .onnx file's name.
        data: Names of its external data files.
        arguments: What ATC is called with.
        key: Digest of graph, weights and arguments: a finished job with this key need not run again.
        memory_bytes: Estimate of what ATC takes at its peak.
        device_bytes: Inputs and outputs on the device.
        weight_bytes: Weights.
        plugins: Parser plugins the graph was lowered for.
    """

    name: str
    directory: Path
    graph: str
    data: tuple[str, ...]
    arguments: tuple[str, ...]
    key: str
    memory_bytes: int
    device_bytes: int
    weight_bytes: int
    plugins: frozenset[str] = frozenset()

    @property
    def command(self) -> str:
        """The command line, quoted for a shell in `directory`."""
        return shlex.join(["atc", *self.arguments])

    @property
    def folder(self) -> Path:
        """Where ATC writes: the .om until it is complete, and the log."""
        return self.directory / WORK_FOLDER / self.name

    @property
    def log(self) -> Path:
        """What ATC printed."""
        return self.folder / "atc.log"


@dataclass(frozen=True)
class Build:
    """All jobs of one call, with what they share."""

    directory: Path
    chip: Chip
    host_cpu: str
    jobs: tuple[Job, ...]
    manifest: Manifest | None
    is_host_cpu_given: bool = False


def plan_build(
    path: Path, chip: Chip, extra: Mapping[str, str], host_cpu: str = "", *, with_keys: bool = True
) -> Build:
    """Compose every job of a model.

    Args:
        path: An .onnx file or a compiled-model directory.
        chip: Target.
        extra: Further flags of ATC.
        host_cpu: aarch64 or x86_64; this machine's when empty.
        with_keys: Whether graphs and weights are hashed; a dry run needs no keys.

    Raises:
        AtcError: Flags exclude each other, names collide, buckets do not fit the chip, the tokenizer does not fit the model.
        GraphError: A graph cannot be read, or its external data is missing.
    """
    graphs = onnx_graphs(path)
    directory = Path(os.path.abspath(graphs[0].parent))
    views = [GraphView(read_onnx(graph)) for graph in graphs]
    cpu = host_cpu or ("x86_64" if platform.machine().lower() in {"x86_64", "amd64"} else "aarch64")
    invocation = Invocation(chip, cpu, len(graphs) > 1, extra)
    hashes: dict[Path, str] = {}
    jobs = tuple(_job(view, invocation, hashes if with_keys else None) for view in views)
    manifest = Manifest.load(directory) if path.is_dir() and (directory / MANIFEST_NAME).is_file() else None
    _refuse_what_does_not_fit(jobs, chip)
    if manifest is not None:
        _check_tokenizer(directory, manifest)
    return Build(directory, chip, cpu, jobs, manifest, bool(host_cpu))


def _job(view: GraphView, invocation: Invocation, hashes: dict[Path, str] | None) -> Job:
    graph = view.file.path
    data = view.file.data_files()
    for name in data:
        if Path(name).name != name:
            raise AtcError(f"{graph}: its weights are in '{name}'; ATC and the build folder want them beside the model")
    stem = graph.name.removesuffix(".onnx")
    arguments = compose(view, graph.name, f"{WORK_FOLDER}/{stem}/{stem}", invocation)
    ports = [*view.inputs, *view.outputs]
    device = sum(tensor_bytes(value.shape or (), value.dtype) for value in ports)
    weights = weight_bytes(view)
    return Job(
        name=stem,
        directory=Path(os.path.abspath(graph.parent)),
        graph=graph.name,
        data=tuple(sorted(data)),
        arguments=tuple(arguments),
        key="" if hashes is None else _key([graph, *(graph.parent / name for name in sorted(data))], arguments, hashes),
        memory_bytes=_BASE_BYTES + _WEIGHT_FACTOR * weights,
        device_bytes=device,
        weight_bytes=weights,
        plugins=plugins_named_in(_metadata(view).get(METADATA_KEY, "")),
    )


def _metadata(view: GraphView) -> dict[str, str]:
    return {entry.key: entry.value for entry in view.file.proto.metadata_props}


def _key(files: Sequence[Path], arguments: Sequence[str], hashes: dict[Path, str]) -> str:
    digest = hashlib.sha256(json.dumps(list(arguments)).encode())
    for file in files:
        if file not in hashes:
            hashes[file] = sha256_of(file)  # weights are shared: each file is read once
        digest.update(hashes[file].encode())
    return digest.hexdigest()


def check_jobs(build: Build, cann: Cann, parsers: Parsers | None = None) -> list[Report]:
    """Check every graph with the options it will be compiled with, and against the parsers that will read it."""
    reports = []
    for job in build.jobs:
        options = replace(options_of(job.arguments), plugins=job.plugins)
        reports.append(check_model(job.directory / job.graph, build.chip, cann, options, parsers))
    return reports


def _refuse_what_does_not_fit(jobs: Sequence[Job], chip: Chip) -> None:
    for job in jobs:
        needed = job.weight_bytes + job.device_bytes
        if needed > chip.usable_bytes:
            raise AtcError(
                f"{job.name}: weights of {job.weight_bytes} bytes and inputs and outputs of {job.device_bytes} do not fit the "
                f"{chip.usable_bytes} bytes that {chip.name} leaves (an estimate, without work space); take smaller buckets "
                "or quantize"
            )


def _check_tokenizer(directory: Path, manifest: Manifest) -> None:
    """The tokenizer must not know tokens that the model has no row for."""
    path = directory / "tokenizer.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = record["model"]["vocab"]
        numbers = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
        numbers += [token["id"] for token in record.get("added_tokens", [])]
        largest = max((n for n in numbers if isinstance(n, int)), default=0)
    except (OSError, ValueError, KeyError, TypeError):
        return  # the runtime says what is wrong with a tokenizer
    if largest >= manifest.model.vocab_size:
        raise AtcError(
            f"{path}: token {largest} does not exist in the model, whose vocabulary has {manifest.model.vocab_size}; copy "
            "the tokenizer that belongs to this checkpoint"
        )


def compile_settings(jobs: Sequence[Job], free_bytes: int | None, cpus: int) -> tuple[int, int]:
    """Return how many jobs may run at once, and how many kernel compilers each may start; both estimates."""
    if free_bytes is None or not jobs:
        return 1, max(1, min(cpus, 8))
    largest = max(job.memory_bytes for job in jobs)
    at_once = max(1, min(len(jobs), cpus // 2 or 1, free_bytes // (largest + 2 * _WORKER_BYTES)))
    left = free_bytes // at_once - largest
    workers = max(1, min(cpus // at_once or 1, _MAX_WORKERS, left // _WORKER_BYTES))
    return int(at_once), int(workers)


def compile_environment(environ: Mapping[str, str], workers: int) -> dict[str, str]:
    """Return the environment of ATC: the user's settings stay, ours fill the gaps."""
    ours = {"TE_PARALLEL_COMPILER": str(workers), "MAX_COMPILE_CORE_NUMBER": str(workers)}
    return {**ours, **environ}
