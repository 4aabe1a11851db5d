"""Run the cases of a benchmark, round by round, each in a fresh process, and put the report together."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompile.benchmark.cases import Case, cases_of, prompts_of
from qcompile.benchmark.machine import busy_warning, describe_machine
from qcompile.benchmark.report import BenchReport, Spread, load_row, noise_warnings, rows_of
from qcompile.benchmark.traffic import Floor, traffic_of
from qcompile.errors import BenchmarkError
from qcompile.quality.documents import built_in_documents
from qcompile.runtime.host import default_threads
from qcompile.runtime.manifest import Manifest
from qcompile.runtime.tokenizer import Tokenizer

Say = Callable[[str, int, int], None]
# Runs a module with a JSON job on stdin and returns its JSON answer: a process, or a stand-in in tests.
RunModule = Callable[[str, dict[str, Any]], dict[str, Any]]

_CHILD, _FLOOR = "qcompile.benchmark.child", "qcompile.benchmark.floor"
_TIMEOUT_S = 900
_TARGETS = ("portable", "ort")


@dataclass(frozen=True)
class BenchOptions:
    """How to measure.

    Attributes:
        quick: Fewer cases and shorter runs.
        repetitions: Rounds; every round runs every case once. None takes 3, or 1 when quick.
        threads: None takes every physical core.
    """

    quick: bool = False
    repetitions: int | None = None
    threads: int | None = None

    @property
    def rounds(self) -> int:
        """Rounds to run."""
        return self.repetitions or (1 if self.quick else 3)


def run_benchmark(
    directory: Path,
    options: BenchOptions | None = None,
    say: Say | None = None,
    run_module: RunModule | None = None,
) -> BenchReport:
    """Time a compiled model.

    Args:
        directory: The compiled-model directory.
        options: See BenchOptions.
        say: Called with (what, done, total).
        run_module: How to run a child.

    Raises:
        BenchmarkError: The model is for another machine, or no case could be run.
        ManifestError: The directory is damaged or is none.
    """
    options = options or BenchOptions()
    run_module = run_module or run_in_process
    report = say or (lambda what, done, total: None)
    started = time.perf_counter()
    manifest = Manifest.load(directory)
    if manifest.target not in _TARGETS:
        raise BenchmarkError(f"{directory}: compiled for {manifest.target}; only ort and portable models run here")
    threads = options.threads or default_threads()
    machine = describe_machine(threads)
    cases = cases_of(quick=options.quick)
    jobs = _jobs(directory, manifest, cases, threads)
    samples: dict[Case, list[dict[str, Any]]] = {case: [] for case in cases}
    floors: list[dict[str, Any]] = []
    for round_number in range(options.rounds):
        done = round_number * (len(cases) + 1)
        report("floor", done, options.rounds * (len(cases) + 1))
        floors.append(run_module(_FLOOR, {"threads": threads, "seconds": 0.5 if options.quick else 1.5}))
        for number, case in enumerate(cases, done + 1):
            report(case.name, number, options.rounds * (len(cases) + 1))
            job = jobs[case]
            samples[case].append(job if "error" in job else run_module(_CHILD, job))
        _check(directory, samples, floors)  # a model that nothing runs of is told after one round
    done_report = _report(directory, manifest, machine, samples, floors)
    done_report.seconds = time.perf_counter() - started
    return done_report


def run_in_process(module: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run one child process to its end; whatever goes wrong comes back as `error`."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", module],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {_TIMEOUT_S} s"}
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": f"the process ended with {done.returncode}: {last}"}
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def _jobs(directory: Path, manifest: Manifest, cases: list[Case], threads: int) -> dict[Case, dict[str, Any]]:
    tokenizer = Tokenizer(directory, manifest)
    ids = [i for document in built_in_documents() for i in tokenizer.encode(document.text or "")]
    most = manifest.model.max_position_embeddings
    jobs: dict[Case, dict[str, Any]] = {}
    for case in cases:
        if case.room > most:
            jobs[case] = {"error": f"{case.room} tokens are needed, the model holds {most}"}
            continue
        jobs[case] = {
            "directory": str(directory),
            "prompts": prompts_of(ids, case),
            "steps": case.steps,
            "room": case.room - case.context,
            "max_model_len": case.room,
            "threads": threads,
        }
    return jobs


def _check(directory: Path, samples: dict[Case, list[dict[str, Any]]], floors: list[dict[str, Any]]) -> None:
    failed = [f["error"] for f in floors if "error" in f]
    if failed:
        raise BenchmarkError(f"the machine's own rates could not be measured: {failed[0]}")
    if all("error" in s for taken in samples.values() for s in taken):
        first = next(s["error"] for taken in samples.values() for s in taken)
        raise BenchmarkError(f"{directory}: no case could be run: {first}")


def _report(
    directory: Path,
    manifest: Manifest,
    machine: dict[str, Any],
    samples: dict[Case, list[dict[str, Any]]],
    floors: list[dict[str, Any]],
) -> BenchReport:
    entry = manifest.graph()
    rates = {name: Spread.of([f[name] for f in floors]) for name in floors[0]}
    floor = Floor(
        bytes_per_s=max(f["read_bytes_per_s"] for f in floors),
        float_ops_per_s=max(f["fp32_ops_per_s"] for f in floors),
        integer_ops_per_s=max(f["int8_ops_per_s"] for f in floors),
    )
    traffic = traffic_of(directory / entry.file.name, manifest.model)
    rows = [*rows_of(samples, traffic, floor), load_row(samples)]
    graph_bytes = entry.file.size_bytes + sum(d.size_bytes for d in entry.data)
    model = {
        "target": manifest.target,
        "model_type": manifest.model.model_type,
        "dtype": entry.io.dtype,
        "size_bytes": graph_bytes,
        "directory_bytes": graph_bytes + sum(f.size_bytes for f in manifest.files),
        "weight_bytes_per_step": traffic.weight_bytes,
        "kv_bytes_per_token": traffic.kv_bytes_per_token,
        "float_weights": traffic.float_weights,
        "integer_weights": traffic.integer_weights,
        "head_weights": traffic.head_weights,
    }
    busy = busy_warning(machine["load_average"], machine["cores"])
    flat = [{"batch": c.batch, "context": c.context, **_lean(s)} for c, taken in samples.items() for s in taken]
    warnings = [*([busy] if busy else []), *noise_warnings(rows)]
    return BenchReport(str(directory), machine, model, rates, rows, flat, warnings)


def _lean(sample: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in sample.items() if key != "prompts"}
