"""The engine's loop, in a thread of its own: requests go in from the event loop, deltas come back to it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable

from qcompile.runtime import Completion, Delta, Engine, SamplingParams

logger = logging.getLogger(__name__)
Sink = Callable[[Delta], None]


class EngineThread:
    """Steps an engine while it has work.

    Args:
        engine: Nobody else may step it.
        loop: Where deltas are delivered.
    """

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        self.engine = engine
        self._loop = loop
        self._sinks: dict[int, Sink] = {}
        self._wake = threading.Condition()  # also guards _sinks
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether requests are being served."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step under way; what is unfinished ends with ``abort``."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()
        self._thread.join()

    def submit(self, prompt_ids: list[int], params: SamplingParams, sink: Sink) -> int:
        """Queue one generation; `sink` gets its deltas in the event loop. Returns its number.

        Raises:
            RequestError: The prompt cannot be served.
        """
        with self._wake:  # no delta can be handed out before its sink is known
            request_id = self.engine.add_request(prompt_ids, params)
            self._sinks[request_id] = sink
            self._wake.notify()
        return request_id

    def abort(self, request_id: int) -> None:
        """End a generation; its sink gets a last delta unless it has had one."""
        with self._wake:
            if request_id in self._sinks:
                self.engine.abort(request_id)
                self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._is_stopping or self.engine.has_work)
                if self._is_stopping:
                    break
            try:
                self._hand_out(self.engine.step())
            except Exception as error:  # the thread must outlive whatever a step meets: all requests hang on it
                logger.exception("a step of the engine failed")
                self._end_all("error", f"{type(error).__name__}: {error}")
        self._end_all("abort", "the server stopped")

    def _hand_out(self, deltas: list[Delta]) -> None:
        with self._wake:
            pairs = [(self._sinks[d.request_id], d) for d in deltas if d.request_id in self._sinks]
            for delta in deltas:
                if delta.completion is not None:
                    self._sinks.pop(delta.request_id, None)
        if pairs:
            self._deliver(pairs)

    def _end_all(self, reason: str, message: str) -> None:
        with self._wake:
            sinks, self._sinks = self._sinks, {}
            for request_id in sinks:
                self.engine.abort(request_id)  # what the failed step did not drop
        self._deliver(
            [
                (sink, Delta(request_id, 0, "", (), Completion(0, finish_reason=reason, error=message)))
                for request_id, sink in sinks.items()
            ]
        )

    def _deliver(self, pairs: list[tuple[Sink, Delta]]) -> None:
        try:
            self._loop.call_soon_threadsafe(_call_each, pairs)
        except RuntimeError:  # the loop is closed: nobody listens any more
            logger.debug("%d deltas came after the event loop had closed", len(pairs))


def _call_each(pairs: list[tuple[Sink, Delta]]) -> None:
    for sink, delta in pairs:
        sink(delta)
