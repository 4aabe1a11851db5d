"""The answers to one request while they are being generated."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from time import perf_counter

from qcompile.runtime import Delta, SamplingParams
from qcompile.runtime.errors import RequestError
from qcompile.serve.admission import Admission
from qcompile.serve.api_error import ApiError
from qcompile.serve.engine_thread import EngineThread
from qcompile.serve.metrics import ServerMetrics
from qcompile.serve.settings import ServeSettings

_NUM_READERS = 2
_SEED_STEP = 0x9E3779B97F4A7C15  # odd: the seeds of 2**64 choices all differ


class Service:
    """What every request needs: the engine's thread, the queue, the settings and the counters."""

    def __init__(self, thread: EngineThread, settings: ServeSettings, metrics: ServerMetrics) -> None:
        self.thread = thread
        self.engine = thread.engine
        self.settings = settings
        self.metrics = metrics
        self.admission = Admission(thread.engine.max_batch_size, settings.max_queue)
        # few threads: each keeps the memory that the longest prompt it has read took
        self.prompt_readers = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="prompts")


class Generation:
    """One request's generations: as many as prompts times choices.

    Args:
        service: The server.
        count: How many there will be; they are let in here.

    Raises:
        ApiError: The queue is full, or the server is shutting down.
    """

    def __init__(self, service: Service, count: int) -> None:
        self._service = service
        self._arrival = perf_counter()
        service.admission.take(count)
        self._num_unsent = count
        self._open: dict[int, int] = {}  # choice: number of its generation
        self._arrived: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        self._has_begun = False
        self._last_delta: dict[int, float] = {}

    @property
    def is_unfinished(self) -> bool:
        """Whether the engine still works on it."""
        return bool(self._open)

    def submit(self, prompts: list[list[int]], params: SamplingParams, num_choices: int) -> None:
        """Hand the prompts to the engine, each `num_choices` times; choice i of prompt p is p * num_choices + i.

        Raises:
            ApiError: 400 for a prompt that cannot be served; nothing is generated then.
        """
        choice = 0
        for prompt in prompts:
            for i in range(num_choices):
                seed = None if params.seed is None else (params.seed + i * _SEED_STEP) % (1 << 64)
                try:
                    number = self._service.thread.submit(
                        prompt, replace(params, seed=seed), partial(self._take, choice)
                    )
                except RequestError as error:
                    raise ApiError(400, str(error), "invalid_value", "prompt") from None
                self._open[choice] = number
                self._num_unsent -= 1
                choice += 1

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """Yield (choice, delta) until every generation has ended.

        Raises:
            ApiError: 503 when no token came within the longest wait, 504 at the deadline, 500 when the model failed.
        """
        pending = len(self._open)
        while pending:
            choice, delta = await self._next()
            if delta.completion is not None:
                pending -= 1
                _raise_failure(delta)
            yield choice, delta

    def close(self) -> None:
        """End what is unfinished; harmless when repeated."""
        for number in self._open.values():
            self._service.thread.abort(number)
        self._service.admission.give_back(self._num_unsent)
        self._num_unsent = 0

    async def _next(self) -> tuple[int, Delta]:
        settings = self._service.settings
        limit = settings.deadline_s if self._has_begun else min(settings.max_wait_s, settings.deadline_s)
        left = self._arrival + limit - perf_counter()
        if left > 0 and not self._arrived.empty():
            await asyncio.sleep(0)  # others have their turn, and a client that left is noticed
            return self._arrived.get_nowait()  # waiting with a limit costs a task
        try:
            return await asyncio.wait_for(self._arrived.get(), max(0.0, left))
        except asyncio.TimeoutError:
            self.close()
        if self._has_begun or limit == settings.deadline_s:
            raise ApiError(504, f"the answer was not complete within {limit:g} seconds", "deadline_exceeded")
        retry = self._service.admission.retry_after_s()
        raise ApiError(
            503, f"no slot became free within {limit:g} seconds; try again", "overloaded", retry_after_s=retry
        )

    def _take(self, choice: int, delta: Delta) -> None:
        """Take a delta from the engine's thread; called in the event loop, also after `close`."""
        now = perf_counter()
        metrics = self._service.metrics
        if delta.token_ids:
            if not self._has_begun:
                metrics.ttft.observe(now - self._arrival)
            elif choice in self._last_delta:
                metrics.token_time.observe(now - self._last_delta[choice])
            self._has_begun = True
            self._last_delta[choice] = now
            metrics.generated_tokens.inc(len(delta.token_ids))
        if delta.completion is not None:
            self._open.pop(choice, None)
            self._service.admission.give_back(1, now - self._arrival)
            metrics.prompt_tokens.inc(delta.completion.num_prompt_tokens)
            metrics.reused_tokens.inc(delta.completion.num_reused_tokens)
        self._arrived.put_nowait((choice, delta))


def _raise_failure(delta: Delta) -> None:
    assert delta.completion is not None
    reason, message = delta.completion.finish_reason, delta.completion.error
    if reason == "error":
        raise ApiError(500, f"the model failed: {message}", "model_failed")
    if reason == "abort":
        raise ApiError(503, message or "the generation was ended", "shutting_down")
