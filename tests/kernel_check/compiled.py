"""Compilations of qcompile's own kernels, kept on disk so that each is made once in a run of the tests."""

import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qcompile.kernel_check.bisheng import compile_linalg
from qcompile.kernel_check.check import Case, Result, check
from qcompile.kernel_check.environment import KernelsEnv
from qcompile.kernel_check.lowering import Job, lower


class CompiledStore:
    """A folder of results by case; a lock per kernel file lets the processes work on different operators."""

    def __init__(self, folder: Path, environment: KernelsEnv) -> None:
        self.folder, self.environment = folder, environment

    def texts(self, job: Job, chip: str = "Ascend910B4") -> tuple[str, str]:
        """Return the linalg and the planned IR of a job.

        A refused job fails the test with the reason.
        """
        key = hashlib.sha256(json.dumps([job.record(), chip, job.file.read_text()]).encode()).hexdigest()
        path = self.folder / f"{key}.json"
        with self.locked(key):
            if not path.exists():
                lowered = next(iter(lower([job], chip, self.environment)))
                assert not lowered.stage, lowered.error
                compiled = compile_linalg(lowered.linalg, chip, self.environment)
                assert compiled.verdict == "ok", compiled.errors
                path.write_text(json.dumps([lowered.linalg, compiled.planned]))
            linalg, planned = json.loads(path.read_text())
            return linalg, planned

    def check(self, cases: list[Case]) -> list[Result]:
        """Check cases, and keep what came of the good ones for `texts`."""
        results = check(cases, self.environment, jobs=2)
        for result in results:
            if result.verdict == "ok":
                job, chip = result.case.job(), result.case.chip
                key = hashlib.sha256(json.dumps([job.record(), chip, job.file.read_text()]).encode()).hexdigest()
                with self.locked(key):
                    (self.folder / f"{key}.json").write_text(json.dumps([result.linalg, result.planned]))
        return results

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Hold a lock that other processes see."""
        with (self.folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
