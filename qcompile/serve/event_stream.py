"""An answer as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from qcompile.serve.api_error import ApiError, dump
from qcompile.serve.generation import Generation
from qcompile.serve.replies import Reply

DONE = b"data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """A stream that tells when it is over, also when the client leaves or stops reading.

    Args:
        events: What to send.
        on_end: Called once, whatever ended it.
        limit_s: The longest time it may last.
    """

    def __init__(self, events: AsyncIterator[bytes], on_end: Callable[[], None], limit_s: float) -> None:
        # proxies must not collect what is meant to be seen as it comes
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._on_end = on_end
        self._limit_s = limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await asyncio.wait_for(super().__call__(scope, receive, send), self._limit_s)
        except asyncio.TimeoutError:  # a client that does not read; uvicorn closes a response that is not complete
            return
        finally:
            self._on_end()


async def events(
    generation: Generation, reply: Reply, deltas: AsyncIterator[tuple[int, Any]], first: tuple[int, Any]
) -> AsyncIterator[bytes]:
    """Yield the events of an answer whose first delta has come; a failure becomes an error event, the last one."""
    for chunk in reply.opening():
        yield event(chunk)
    try:
        for chunk in reply.chunks(*first):
            yield event(chunk)
        async for choice, delta in deltas:
            for chunk in reply.chunks(choice, delta):
                yield event(chunk)
    except ApiError as error:
        generation.close()
        yield event(error.body())
        return
    for chunk in reply.closing():
        yield event(chunk)
    yield DONE


def event(record: dict[str, Any]) -> bytes:
    """Return one event."""
    return b"data: " + dump(record) + b"\n\n"
