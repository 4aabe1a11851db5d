"""What every engine's process does: load, time, say what it thinks of given tokens. NumPy and the standard library only.

An engine module gives `load(job) -> Engine` and ends with `serve(load)`. The job is JSON on stdin, the answer the last line of
stdout, behind `RESULT `.

    task "speed"      greedy generation from the prompts, end tokens ignored
    task "reference"  write the logits of the texts to job["logits"], float32 [tokens, vocabulary]
    task "quality"    compare the engine's logits of the same texts with that file
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

_ROWS = 8
MARK = "RESULT "


class Timing(NamedTuple):
    """One generation: seconds to the first token (of every row), then tokens of all rows and the seconds they took."""

    first_s: float
    decode_s: float
    decode_tokens: int
    tokens: list[int]


class Engine(Protocol):
    """A loaded model."""

    def generate(self, prompts: Sequence[Sequence[int]], count: int) -> Timing:
        """Write exactly `count` tokens per prompt; prompts have one length."""

    def logits(self, ids: Sequence[int]) -> Iterator[np.ndarray]:
        """Yield the logits [S, V] of a text, piece by piece; together one row per token."""


def serve(load: Callable[[dict[str, Any]], Engine]) -> None:
    """Do the job on stdin and print the answer."""
    job = json.loads(sys.stdin.read())
    started = time.perf_counter()
    engine = load(job)
    answer: dict[str, Any] = {"load_s": time.perf_counter() - started, "loaded_rss_bytes": peak_rss_bytes()}
    task = {"speed": speed, "reference": write_reference, "quality": quality}[job["task"]]
    answer.update(task(engine, job))
    answer["peak_rss_bytes"] = peak_rss_bytes()
    print(f"\n{MARK}{json.dumps(answer)}", flush=True)


def speed(engine: Engine, job: dict[str, Any]) -> dict[str, Any]:
    """Time prompts of two lengths, a batch, and write the answers to the chat prompts."""
    prompts = job["prompts"]
    engine.generate(prompts["short"][-1:], 4)
    figures = {}
    for name, rows, count in (
        ("short", prompts["short"][:1], job["count"]),
        ("long", prompts["long"][:1], job["count"]),
        ("batch", prompts["short"], job["batch_count"]),
    ):
        timing = engine.generate(rows, count)
        figures[f"{name}_prefill"] = sum(map(len, rows)) / timing.first_s
        figures[f"{name}_decode"] = timing.decode_tokens / timing.decode_s
    answers = [engine.generate([prompt], job["answer_count"]).tokens for prompt in prompts["chat"]]
    return {**figures, "answers": answers}


def write_reference(engine: Engine, job: dict[str, Any]) -> dict[str, Any]:
    """Write the logits of all texts, one behind another."""
    path = Path(job["logits"])
    temporary = path.with_name(f".{path.name}.tmp")
    rows = 0
    with temporary.open("wb") as stream:
        for ids in job["texts"]:
            for piece in engine.logits(ids):
                np.ascontiguousarray(piece, np.float32).tofile(stream)
                rows += len(piece)
    temporary.replace(path)
    return {"tokens": rows}


def quality(engine: Engine, job: dict[str, Any]) -> dict[str, Any]:
    """Compare with the reference's logits, row by row, on the columns both have."""
    tokens = sum(len(ids) for ids in job["texts"])
    reference = np.memmap(job["logits"], np.float32, "r").reshape(tokens, -1)
    kl: list[float] = []
    same = 0
    for ids in job["texts"]:
        for piece in engine.logits(ids):
            width = min(piece.shape[1], reference.shape[1])
            for start in range(0, len(piece), _ROWS):
                a = np.asarray(reference[len(kl) : len(kl) + len(piece[start : start + _ROWS]), :width], np.float64)
                b = np.asarray(piece[start : start + _ROWS, :width], np.float64)
                same += int((a.argmax(axis=1) == b.argmax(axis=1)).sum())
                kl += divergence(a, b).tolist()
    if len(kl) != tokens:
        raise ValueError(f"{len(kl)} rows of logits, the reference has {tokens}")
    return {
        "tokens": tokens,
        "mean_kl": float(np.mean(kl)),
        "p99_kl": float(np.percentile(kl, 99)),
        "top1": same / tokens,
    }


def divergence(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return KL(softmax(a) || softmax(b)) of each row [S, V], float64, in nats."""
    log_p = a - a.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    log_q = b - b.max(axis=1, keepdims=True)
    log_q -= np.log(np.exp(log_q).sum(axis=1, keepdims=True))
    return np.maximum((np.exp(log_p) * (log_p - log_q)).sum(axis=1), 0.0)


def peak_rss_bytes() -> int:
    """Return this process's own high-water mark."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return 0


class Stopwatch:
    """Notes when the first token of every row is there, and counts those after it."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.started = time.perf_counter()
        self.first_s = 0.0
        self.steps = 0
        self.tokens: list[int] = []

    def step(self, token: int) -> None:
        """Note one step of all rows; `token` is row 0's."""
        self.tokens.append(token)
        self.steps += 1
        if self.steps == 1:
            self.first_s = time.perf_counter() - self.started

    def timing(self) -> Timing:
        """Return the result."""
        seconds = time.perf_counter() - self.started
        return Timing(self.first_s, seconds - self.first_s, self.rows * (self.steps - 1), self.tokens)
