"""Time one step of the optimization in a fresh process: `python -m qcompile.package.step_child`, JSON in, JSON out.

The original model is run plainly by transformers (eager attention, float32), every other step by the runtime.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qcompile.package.contest.ladder import Backend, encode_question
from qcompile.runtime import SamplingParams
from qcompile.runtime.errors import QCompileError


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Load, warm up, answer every question; tokens, seconds and the texts."""
    start = time.perf_counter()
    backend = _open(job)
    load_s = time.perf_counter() - start
    _answer(backend, job["conversations"][:1], {**job["options"], "max_new_tokens": 4}, 1)
    start = time.perf_counter()
    completions = _answer(backend, job["conversations"], job["options"], job["batch_size"])
    seconds = time.perf_counter() - start
    backend.close()
    return {
        "load_s": load_s,
        "seconds": seconds,
        "tokens": sum(len(completion.token_ids) for completion in completions),
        "texts": [completion.text for completion in completions],
        "ttft_s": [completion.ttft_s for completion in completions] if job["batch_size"] == 1 else [],
    }


def _open(job: dict[str, Any]) -> Backend:
    backend: Backend
    if job["kind"] == "transformers":
        import torch

        from qcompile.package.contest.transformers_backend import TransformersBackend

        torch.set_num_threads(job["threads"])
        return TransformersBackend(Path(job["path"]), job["batch_size"], device="cpu")
    from qcompile.runtime import Engine

    backend = Engine(job["path"], job["threads"], job["batch_size"], reuse_prefixes=False)
    return backend


def _answer(backend: Backend, conversations: Sequence[Any], options: dict[str, Any], batch_size: int) -> list[Any]:
    """Answer all, at most `batch_size` together, in order.

    Raises:
        QCompileError: One could not be answered.
    """
    waiting = list(enumerate(conversations))[::-1]
    running: dict[int, int] = {}
    completions: dict[int, Any] = {}
    while waiting or running:
        while waiting and len(running) < batch_size:
            place, messages = waiting.pop()
            running[backend.add_request(encode_question(backend, messages), SamplingParams(**options))] = place
        for delta in backend.step():
            if delta.completion is not None:
                if delta.completion.error:
                    raise QCompileError(delta.completion.error)
                completions[running.pop(delta.request_id)] = delta.completion
    return [completions[place] for place in range(len(conversations))]


if __name__ == "__main__":
    try:
        record = run_job(json.loads(sys.stdin.read()))
    except (QCompileError, ImportError, OSError, ValueError, RuntimeError, MemoryError) as error:
        record = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:400]}
    sys.stdout.write(json.dumps(record) + "\n")
