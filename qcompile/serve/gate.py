"""Before any route: who may ask, and how the answer is counted."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qcompile.serve.api_error import ApiError
from qcompile.serve.metrics import ServerMetrics
from qcompile.serve.settings import ServeSettings, is_loopback

_OPEN_PATHS = ("/health",)  # load balancers ask without a token
_COUNTED_PATHS = ("/health", "/metrics", "/v1/chat/completions", "/v1/completions", "/v1/models")


class Gate:
    """Checks the bearer token; without one, that the request was meant for this machine.

    Args:
        app: What comes behind.
        settings: With the token.
        metrics: Where requests are counted.
        max_open: The most requests under way: each holds a body in memory before the queue can refuse it.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, metrics: ServerMetrics, max_open: int) -> None:
        self._app = app
        self._api_key = None if settings.api_key is None else settings.api_key.encode("ascii")
        self._metrics = metrics
        self._max_open = max_open
        self._num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in _COUNTED_PATHS else "other"
        status = 499

        async def count_and_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._num_open += 1
        try:
            refusal = self._refusal(scope)
            if refusal is None:
                await self._app(scope, receive, count_and_send)
            else:
                await refusal.response()(scope, receive, count_and_send)
        finally:
            self._num_open -= 1
            self._metrics.requests.labels(path, str(status)).inc()

    def _refusal(self, scope: Scope) -> ApiError | None:
        if self._num_open > self._max_open and scope["path"] not in _OPEN_PATHS:
            return ApiError(
                503, f"more than {self._max_open} requests are open; try again", "overloaded", retry_after_s=1
            )
        headers = dict(scope["headers"])
        if self._api_key is None:
            # a page in a browser may have its own name point here (DNS rebinding); the Host header tells
            host = headers.get(b"host", b"localhost").decode("latin-1")
            name = host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host
            if not is_loopback(name):
                return ApiError(403, "without a token only localhost and 127.0.0.1 are served", "wrong_host")
            return None
        if scope["path"] in _OPEN_PATHS:
            return None
        kind, _, token = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() != b"bearer":
            return ApiError(401, "no bearer token: send 'Authorization: Bearer KEY'", "missing_api_key")
        if not hmac.compare_digest(token.strip(), self._api_key):
            return ApiError(401, "the bearer token is wrong", "invalid_api_key")
        return None
