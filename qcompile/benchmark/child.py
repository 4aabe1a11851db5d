"""Time one case in a fresh process: `python -m qcompile.benchmark.child` reads a JSON job from stdin, answers in JSON.

The process imports the runtime only, so its peak memory is what a user of the model needs.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qcompile.runtime import Engine, SamplingParams
from qcompile.runtime.errors import QCompileError

Clock = Callable[[], float]
_WARM_TOKENS = 4


class CaseError(QCompileError):
    """A request ended before it could be timed."""


def measure(engine: Any, prompts: Sequence[Sequence[int]], steps: int, room: int, clock: Clock) -> dict[str, float]:
    """Serve all prompts together and time the first token and `steps` decode steps with every row running.

    Args:
        engine: An idle `Engine` (or what behaves like one).
        prompts: Token ids.
        steps: Decode steps to time.
        room: Most tokens a request may write; more than all steps together.
        clock: Seconds.

    Returns:
        `ttft_s` (first token of the first request), `prefill_s` (first token of the last one), `decode_s`,
        `decode_tokens` and `mean_context` (tokens in a row's cache, on average over the timed steps).

    Raises:
        CaseError: A request failed or ended early.
    """
    written: dict[int, int] = {}
    started = clock()
    for prompt in prompts:
        written[engine.add_request(list(prompt), SamplingParams(max_new_tokens=room, ignore_eos=True))] = 0
    ttft = 0.0
    while not all(written.values()):
        _step(engine, written)
        if not ttft and any(written.values()):
            ttft = clock() - started
    prefill = clock() - started
    before = sum(written.values())
    timed = clock()
    for _ in range(steps):
        _step(engine, written)
    seconds = clock() - timed
    after = sum(written.values())
    for request in written:
        engine.abort(request)
    while engine.has_work:
        engine.step()
    rows = len(prompts)
    return {
        "ttft_s": ttft,
        "prefill_s": prefill,
        "decode_s": seconds,
        "decode_tokens": after - before,
        "mean_context": (sum(map(len, prompts)) + (before + after) / 2) / rows,
    }


def _step(engine: Any, written: dict[int, int]) -> None:
    for delta in engine.step():
        written[delta.request_id] += len(delta.token_ids)
        if delta.completion is not None:
            done = delta.completion
            raise CaseError(f"a request ended with '{done.finish_reason}' before it was timed: {done.error or ''}")


def run_job(job: dict[str, Any], clock: Clock = time.perf_counter) -> dict[str, Any]:
    """Load the model, warm up, measure; everything in seconds and bytes."""
    prompts, room = job["prompts"], job["room"]
    started = clock()
    with Engine(
        Path(job["directory"]),
        threads=job["threads"],
        max_batch_size=len(prompts),
        max_model_len=job["max_model_len"],
        reuse_prefixes=False,
    ) as engine:
        load_s = clock() - started
        loaded_bytes = peak_rss_bytes()
        warm = SamplingParams(max_new_tokens=_WARM_TOKENS, ignore_eos=True)
        engine.generate([prompts[-1][: min(32, len(prompts[-1]))]], warm)
        figures = measure(engine, prompts, job["steps"], room, clock)
    return {"load_s": load_s, "loaded_rss_bytes": loaded_bytes, **figures, "peak_rss_bytes": peak_rss_bytes()}


def peak_rss_bytes(status: Path = Path("/proc/self/status")) -> int:
    """Return this process's own high-water mark (VmHWM); file-mapped pages that were touched count."""
    try:
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def answer(job_text: str) -> dict[str, Any]:
    """Run a job; a failure comes back as one line."""
    try:
        return run_job(json.loads(job_text))
    except QCompileError as error:
        return {"error": " ".join(str(error).split())}
    except MemoryError:
        return {"error": "out of memory"}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(answer(sys.stdin.read())) + "\n")
