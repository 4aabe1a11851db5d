"""ModelArts' custom engine: `POST /` answers, `GET /health` is 200 once the model is loaded.

    python -m qcompile_service.server ROOT [--port 8080] [--certificate FILE --key FILE]

SIGTERM lets the requests that were taken finish.
"""

import argparse
import json
import signal
import socket
import ssl
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Dict, List, Optional, Set

from qcompile.package.service.answering import Answering
from qcompile.package.service.bodies import MAX_BODY_BYTES

_STATUS = {"invalid_request": 400, "not_ready": 503, "failed": 500}
_PATHS = ("/", "/predict")
_MAX_DISCARDED_BYTES = 16 << 20
_IDLE_S = 60.0  # a client that sends nothing


class Server(ThreadingHTTPServer):
    """The server with its model; closing waits for the requests that were taken."""

    daemon_threads = False
    request_queue_size = 1024  # five is the default: a burst of clients would be cut off

    def __init__(self, port: int, answering: Answering) -> None:
        super().__init__(("0.0.0.0", port), Handler)
        self.answering = answering
        self._lock = threading.Lock()
        self._silent: Set[socket.socket] = set()  # connections between two requests
        self._is_ending = False

    def expect(self, connection: socket.socket) -> bool:
        """Note that a connection waits for a request; returns whether one is still taken."""
        with self._lock:
            if not self._is_ending:
                self._silent.add(connection)
            return not self._is_ending

    def take(self, connection: socket.socket) -> None:
        """Note that a request has begun, or that the connection is over."""
        with self._lock:
            self._silent.discard(connection)

    def end(self) -> None:
        """Take no request any more: a client that keeps a silent connection open must not hold up the end."""
        with self._lock:
            self._is_ending = True
            for connection in self._silent:
                with suppress(OSError):
                    socket.socket.shutdown(connection, socket.SHUT_RD)
        self.shutdown()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    timeout = _IDLE_S

    def handle_one_request(self) -> None:
        """Wait for a request and answer it, unless the server is ending."""
        if not self.server.expect(self.connection):
            self.close_connection = True
            return
        try:
            super().handle_one_request()
        finally:
            self.server.take(self.connection)

    def parse_request(self) -> bool:
        """Read the head of a request whose first line has come."""
        self.server.take(self.connection)
        return super().parse_request()

    def do_GET(self) -> None:
        """Answer the health probe."""
        answering = self.server.answering
        if self.path != "/health":
            self._send(404, {"error": {"message": f"{self.path[:80]}: no such path", "type": "not_found"}})
        elif answering.failure:
            self._send(500, {"status": "FAILED", "message": answering.failure})
        else:
            self._send(200 if answering.is_ready else 503, {"status": "OK" if answering.is_ready else "LOADING"})

    def do_POST(self) -> None:
        """Answer a request."""
        length = self.headers.get("Content-Length", "")
        is_number = length.isascii() and length.isdigit()
        if not is_number or len(length) > 9 or int(length) > MAX_BODY_BYTES:
            self.close_connection = True
            self._discard(int(length) if is_number and len(length) <= 9 else 0)
            message = f"a body with a Content-Length of at most {MAX_BODY_BYTES} bytes is wanted"
            self._send(413 if is_number else 411, {"error": {"message": message, "type": "invalid_request"}})
            return
        body = self.rfile.read(int(length))
        if self.path not in _PATHS:
            self._send(404, {"error": {"message": f"{self.path[:80]}: no such path", "type": "not_found"}})
            return
        answer = self.server.answering.answer(self.server.answering.read(body))
        self._send(_STATUS.get(answer.get("error", {}).get("type", ""), 200), answer)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log to stdout, as ModelArts wants it."""
        sys.stdout.write(f"{self.address_string()} {format % arguments}\n")
        sys.stdout.flush()

    def _discard(self, length: int) -> None:
        """Read a body that is too large and forget it: a client still writing would not read the answer."""
        left = min(length, _MAX_DISCARDED_BYTES)
        while left > 0:
            left -= len(self.rfile.read(min(left, 1 << 16))) or left

    def _send(self, status: int, record: Dict[str, Any]) -> None:
        content = json.dumps(record, ensure_ascii=False).encode("utf-8")
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def main(arguments: Optional[List[str]] = None) -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description="Serve a compiled model as ModelArts' custom engine.")
    parser.add_argument("root")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--time-limit", type=float, default=55.0, help="seconds of a request; the gateway has 60")
    parser.add_argument("--certificate")
    parser.add_argument("--key")
    options = parser.parse_args(arguments)
    server = Server(options.port, Answering(options.root, options.time_limit))
    if options.certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(options.certificate, options.key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.end).start())
    server.serve_forever()
    server.server_close()


if __name__ == "__main__":
    main()
