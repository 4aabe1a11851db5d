"""Listen, serve, and finish in order."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from qcompile.errors import ServeError
from qcompile.serve.app import create_app
from qcompile.serve.engine_thread import EngineThread
from qcompile.serve.generation import Service
from qcompile.serve.http_protocol import HttpProtocol
from qcompile.serve.metrics import ServerMetrics
from qcompile.serve.settings import ServeSettings, check_exposure

if TYPE_CHECKING:
    from qcompile.runtime import Engine

_BACKLOG = 1024
_POLL_S = 0.05


def bind(host: str, port: int, settings: ServeSettings) -> socket.socket:
    """Return a socket on that address, not listening yet: clients are refused until the model is there.

    Raises:
        ServeError: The address is taken or not this machine's, or open to others without a token.
    """
    check_exposure(host, settings.api_key)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise ServeError(f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port") from None
    return listener


def url_of(listener: socket.socket) -> str:
    """Return the address that clients use."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


class Server:
    """An HTTP server over one engine.

    Args:
        engine: Stepped by this server only; closed by the caller.
        settings: How to answer.
        grace_s: The longest time to finish what was taken when asked to stop.
        on_ready: Called when requests are taken.
    """

    def __init__(
        self,
        engine: Engine,
        settings: ServeSettings,
        grace_s: float = 60.0,
        on_ready: Callable[[], None] | None = None,
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._grace_s = grace_s
        self._on_ready = on_ready
        self._stop_requests = 0
        self._started = threading.Event()

    def run(self, listener: socket.socket) -> None:
        """Serve until `stop` is called or SIGTERM or SIGINT comes; then finish what was taken.

        A second signal ends it at once.
        """
        asyncio.run(self._run(listener))

    def stop(self) -> None:
        """Ask for the end from any thread or signal handler; a second call gives up what is unfinished."""
        self._stop_requests += 1

    def wait_until_ready(self, timeout_s: float) -> bool:
        """Wait from another thread until requests are taken."""
        return self._started.wait(timeout_s)

    async def _run(self, listener: socket.socket) -> None:
        metrics = ServerMetrics()
        metrics.watch(self._engine)
        thread = EngineThread(self._engine, asyncio.get_running_loop())
        service = Service(thread, self._settings, metrics)
        server = _Uvicorn(_configuration(service))
        thread.start()
        try:
            with self._signals():
                serving = asyncio.ensure_future(server.serve(sockets=[listener]))
                while not server.started and not serving.done():
                    await asyncio.sleep(_POLL_S)
                if server.started:
                    self._started.set()
                    if self._on_ready is not None:
                        self._on_ready()
                while not self._stop_requests and not serving.done():
                    await asyncio.sleep(_POLL_S)
                await self._drain(service, server)
                await serving
        finally:
            await asyncio.to_thread(thread.stop)
            service.prompt_readers.shutdown(wait=False, cancel_futures=True)

    async def _drain(self, service: Service, server: uvicorn.Server) -> None:
        """Refuse what is new, finish what was taken."""
        service.admission.is_closed = True
        loop = asyncio.get_running_loop()
        end = loop.time() + self._grace_s
        while service.admission.num_open and loop.time() < end and self._stop_requests < 2:
            await asyncio.sleep(_POLL_S)
        if service.admission.num_open:
            await asyncio.to_thread(service.thread.stop)  # the rest is told so
        server.should_exit = True

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            del number, frame
            self.stop()

        previous = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class _Uvicorn(uvicorn.Server):
    """Leaves signals to `Server`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Do nothing: the default would end at once what should be finished first."""
        yield


def _configuration(service: Service) -> uvicorn.Config:
    return uvicorn.Config(
        create_app(service),
        http=HttpProtocol,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        backlog=_BACKLOG,
        server_header=False,
        timeout_graceful_shutdown=5,
    )
