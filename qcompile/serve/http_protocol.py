"""HTTP/1.1 as uvicorn speaks it; what is no HTTP gets OpenAI's error shape too, and nobody may stay silent."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from qcompile.serve.api_error import ApiError, dump

_SILENCE_S = 15.0  # a connection on which no request begins is closed after one to two times this long


class HttpProtocol(H11Protocol):
    """One connection."""

    _watch: asyncio.TimerHandle | None = None
    _seen: object = None  # the finished request, or None, that was the last one when the timer ran

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, and look after the connection: uvicorn waits for a request's head without end."""
        super().connection_made(transport)
        self._seen = self
        self._close_if_silent()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        if self._watch is not None:
            self._watch.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP request, and close: where the next one would begin cannot be known."""
        del msg
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            error = ApiError(400, "this is no valid HTTP/1.1 request (or its headers are too long)", "invalid_http")
            body = dump(error.body())
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode("ascii")),
                (b"connection", b"close"),
            ]
            for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _close_if_silent(self) -> None:
        if self.transport.is_closing():
            return
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and self._seen is self.cycle:
            self.transport.close()
            return
        self._seen = self.cycle if is_idle else self
        self._watch = self.loop.call_later(_SILENCE_S, self._close_if_silent)
