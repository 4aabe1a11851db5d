"""qcompile itself: the engine for speed, the scorer of `qcompile quality` for logits."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from protocol import Timing, serve

from qcompile.runtime import Engine, SamplingParams

_PIECE = 64


class QcompileEngine:
    """A compiled model."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.directory, self.threads = Path(job["model"]), job["threads"]
        self.engine: Any = None
        self.scorer: Any = None
        if job["task"] == "speed":
            self.engine = Engine(self.directory, threads=self.threads, max_batch_size=8, reuse_prefixes=False)
        else:
            from qcompile.quality.models import open_model
            from qcompile.quality.scorer import Scorer

            room = max(len(ids) for ids in job["texts"])
            self.scorer = Scorer(open_model(self.directory), room, self.threads, with_stream=False)

    def generate(self, prompts: Sequence[Sequence[int]], count: int) -> Timing:
        """See protocol.Engine. Earlier rows already decode while later prompts are computed: all rows are timed together."""
        room = count + len(prompts) * (len(prompts[0]) // 64 + 2)
        params = SamplingParams(max_new_tokens=room, ignore_eos=True)
        started = time.perf_counter()
        written: dict[int, list[int]] = {self.engine.add_request(list(prompt), params): [] for prompt in prompts}
        while not all(written.values()):
            self._step(written)
        first = time.perf_counter() - started
        before = sum(map(len, written.values()))
        for _ in range(count - 1):
            self._step(written)
        seconds = time.perf_counter() - started - first
        tokens = sum(map(len, written.values())) - before
        for request in written:
            self.engine.abort(request)
        while self.engine.has_work:
            self.engine.step()
        return Timing(first, seconds, tokens, next(iter(written.values()))[:count])

    def logits(self, ids: Sequence[int]) -> Iterator[np.ndarray]:
        """See protocol.Engine."""
        self.scorer.reset()
        for start in range(0, len(ids), _PIECE):
            yield self.scorer.extend(np.array(ids[start : start + _PIECE], np.int64)).logits

    def _step(self, written: dict[int, list[int]]) -> None:
        for delta in self.engine.step():
            written[delta.request_id] += delta.token_ids


if __name__ == "__main__":
    serve(QcompileEngine)
