"""The interleaved run: every round starts every engine once, in a fresh process, beginning with another one each time."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol import MARK
from setup_peers import Prepared

_TIMEOUT_S = 1800


@dataclass(frozen=True)
class Job:
    """What every engine is asked.

    Attributes:
        checkpoint: The Hugging Face directory.
        threads: Computing threads.
        logits: The file of the reference's logits.
        prompts: Token ids: ``short`` (several), ``long``, ``chat``.
        texts: Token ids whose logits are compared.
        count: Tokens written after the short and the long prompt.
        batch_count: Tokens per row in the batch.
        answer_count: Tokens written after each chat prompt.
    """

    checkpoint: str
    threads: int
    logits: str
    prompts: dict[str, list[list[int]]]
    texts: list[list[int]]
    count: int = 64
    batch_count: int = 32
    answer_count: int = 64

    def record(self, task: str, peer: Prepared) -> dict[str, Any]:
        """Return the job of one process."""
        return {**vars(self), "task": task, "model": peer.model, "options": peer.options}


@dataclass(frozen=True)
class Plan:
    """Everything to run."""

    job: Job
    peers: tuple[Prepared, ...]
    reference: str
    rounds: int
    skip_quality: bool = False

    def steps(self) -> Iterator[tuple[str, int, Prepared]]:
        """Yield (task, round, peer): first the reference's logits, then everybody's quality, then the rounds."""
        good = [p for p in self.peers if not p.problem]
        reference = [p for p in good if p.name == self.reference]
        if reference and not self.skip_quality:
            yield "reference", 0, reference[0]
            for peer in good:
                yield "quality", 0, peer
        for number in range(self.rounds):
            turn = number % max(len(good), 1)
            for peer in (*good[turn:], *good[:turn]):
                yield "speed", number, peer


class Runner:
    """Starts processes."""

    def __call__(self, command: Sequence[str], job: dict[str, Any]) -> dict[str, Any]:
        """Run one to its end; whatever goes wrong comes back as `error`."""
        threads = str(job["threads"])
        variables = {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false",
        }
        try:
            done = subprocess.run(
                list(command),
                input=json.dumps(job),
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
                env=variables,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"took longer than {_TIMEOUT_S} s"}
        except OSError as error:
            return {"error": str(error)}
        return answer_of(done.returncode, done.stdout, done.stderr)


def answer_of(code: int, stdout: str, stderr: str) -> dict[str, Any]:
    """Find the answer in what a process printed."""
    for line in reversed(stdout.splitlines()):
        if line.startswith(MARK):
            answer: dict[str, Any] = json.loads(line[len(MARK) :])
            return answer
    last = [line for line in (stderr or stdout).splitlines() if line.strip()][-1:] or ["no message"]
    return {"error": f"ended with {code}: {last[0].strip()[:300]}"}


def measure_all(
    plan: Plan,
    log: Path,
    runner: Callable[[Sequence[str], dict[str, Any]], dict[str, Any]],
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Run every step that the log does not hold yet; every answer is appended to it at once.

    Args:
        plan: What to run.
        log: JSON lines; those of another plan (other prompts, other models) are not used.
        runner: Starts a process.
        say: Told about every step.
    """
    key = plan_key(plan)
    samples = [s for s in read_log(log) if s.get("plan") == key]
    done = {(s["task"], s["round"], s["peer"]) for s in samples if "error" not in s}
    steps = list(plan.steps())
    for number, (task, round_number, peer) in enumerate(steps, 1):
        if (task, round_number, peer.name) in done:
            continue
        say(f"{number}/{len(steps)} {task} {peer.name}")
        answer = runner(peer.command, plan.job.record(task, peer))
        sample = {"task": task, "round": round_number, "peer": peer.name, "plan": key, **answer}
        samples.append(sample)
        with log.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(sample) + "\n")
    return samples


def plan_key(plan: Plan) -> str:
    """Return what makes two runs comparable: same texts, same models, same threads."""
    import hashlib

    models = [(p.name, p.model, p.size_bytes) for p in plan.peers]
    return hashlib.sha256(json.dumps([vars(plan.job), models]).encode()).hexdigest()[:16]


def read_log(log: Path) -> list[dict[str, Any]]:
    """Return the samples of an earlier run; a last line cut short by an interruption is dropped."""
    if not log.is_file():
        return []
    samples = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            samples.append(json.loads(line))
        except ValueError:
            continue
    return samples
