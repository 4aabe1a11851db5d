"""Connections rather than requests: what is no HTTP, who stays silent, who claims too much, too many at once."""

import asyncio
import json
import socket
from typing import Any
from unittest.mock import Mock

import pytest

from qcompile.serve.gate import Gate
from qcompile.serve.http_protocol import HttpProtocol
from qcompile.serve.metrics import ServerMetrics
from qcompile.serve.settings import ServeSettings
from tests.serve.conftest import NAME, Running

POST = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


def exchange(server: Running, sent: bytes) -> tuple[bytes, bytes]:
    """Send bytes; return head and body of what comes until the server closes."""
    port = int(server.root.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(sent)
        received = b""
        while piece := connection.recv(65536):
            received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    return head, body


@pytest.mark.parametrize(
    "sent",
    [
        b"GARBAGE\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n",
        b"GET /v1/models/\xff HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        POST + b"Content-Length: -5\r\n\r\n",
        POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
        POST + b"X: " + b"a" * 70_000,
    ],
)
def test_what_is_no_http_gets_the_same_shape(server: Running, sent: bytes) -> None:
    head, body = exchange(server, sent)
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["error"]["code"] == "invalid_http"


def test_a_length_that_nobody_will_send_is_refused_at_once(server: Running) -> None:
    for length in (b"99999999999", b"9" * 19):
        head, body = exchange(server, POST + b"Content-Length: " + length + b"\r\n\r\n{")
        assert head.startswith(b"HTTP/1.1 413 ")
        assert json.loads(body)["error"]["code"] == "request_too_large"


@pytest.mark.parametrize("sent", [b"", b"GET /v1/mod", POST])
def test_a_silent_connection_is_closed(server: Running, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.serve.http_protocol._SILENCE_S", 0.1)
    assert exchange(server, sent) == (b"", b"")


def test_a_request_under_way_is_not_silence_and_a_finished_one_gives_time_for_the_next() -> None:
    connection = HttpProtocol.__new__(HttpProtocol)
    connection.transport = Mock(is_closing=lambda: False)
    connection.loop = Mock()
    connection.cycle = Mock(response_complete=False)
    for _ in range(3):
        connection._close_if_silent()
    connection.cycle.response_complete = True
    connection._close_if_silent()
    connection.transport.close.assert_not_called()
    connection._close_if_silent()
    connection.transport.close.assert_called_once()


def test_one_request_too_many_is_503_and_health_still_answers() -> None:
    async def waits(scope: Any, receive: Any, send: Any) -> None:
        await go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def ask(path: str) -> int:
        statuses = []

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        scope = {"type": "http", "path": path, "method": "GET", "headers": [(b"host", b"localhost")]}
        await gate(scope, asyncio.Queue().get, send)
        return int(statuses[0])

    async def main() -> None:
        taken = [asyncio.create_task(ask("/v1/models")) for _ in range(2)]
        await asyncio.sleep(0)
        assert await ask("/v1/models") == 503
        health = asyncio.create_task(ask("/health"))
        await asyncio.sleep(0)
        go.set()
        assert await asyncio.gather(*taken, health) == [200, 200, 200]
        assert await ask("/v1/models") == 200

    go = asyncio.Event()
    gate = Gate(waits, ServeSettings(NAME), ServerMetrics(), max_open=2)
    asyncio.run(main())


def test_kv_use_is_told(server: Running) -> None:
    server.http.post("/v1/completions", json={"model": NAME, "prompt": "Hello", "max_tokens": 2})
    assert server.metric("qcompile_kv_tokens_reserved") > 0
    assert server.metric("qcompile_kv_tokens_used") == 0
