"""A server over a tiny model, in a thread, on a free port of this machine."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from qcompile.runtime import Engine
from qcompile.serve.server import Server, bind, url_of
from qcompile.serve.settings import ServeSettings
from tests.runtime.toy_compiler import compile_tiny

NAME = "tiny"
KEY = "test-key"


class Running:
    """A server that takes requests, and clients of it."""

    def __init__(self, server: Server, engine: Engine, url: str, api_key: str | None) -> None:
        self.server = server
        self.engine = engine
        self.url = url
        self.root = url.removesuffix("/v1")
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self.http = httpx.Client(base_url=self.root, headers=headers, timeout=30, trust_env=False)
        self.openai = OpenAI(
            base_url=url,
            api_key=api_key or "none",
            max_retries=0,
            timeout=30,
            http_client=httpx.Client(trust_env=False),
        )

    def metric(self, name: str, **labels: str) -> float:
        """Return a counter or gauge of /metrics; 0 when it is not there."""
        wanted = {f'{key}="{value}"' for key, value in labels.items()}
        for line in self.http.get("/metrics").text.splitlines():
            full, _, value = line.rpartition(" ")
            found, _, inside = full.partition("{")
            if found == name and wanted <= set(inside.rstrip("}").split(",")):
                return float(value)
        return 0.0


@contextmanager
def running(
    model: Path, *, batch: int = 4, api_key: str | None = None, grace_s: float = 30, **settings: Any
) -> Iterator[Running]:
    """Serve a model while the block runs."""
    chosen = ServeSettings(NAME, api_key, **settings)
    with Engine(model, threads=1, max_batch_size=batch) as engine, bind("127.0.0.1", 0, chosen) as listener:
        server = Server(engine, chosen, grace_s)
        thread = threading.Thread(target=server.run, args=(listener,))
        url = url_of(listener)
        thread.start()
        try:
            assert server.wait_until_ready(30)
            clients = Running(server, engine, url, api_key)
            with clients.http, clients.openai:
                yield clients
        finally:
            server.stop()
            thread.join(40)
            assert not thread.is_alive()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_tiny(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def server(model: Path) -> Iterator[Running]:
    with running(model) as served:
        yield served


@pytest.fixture(scope="session")
def alone(model: Path) -> Iterator[Engine]:
    """The same model, one request at a time, nothing reused: what every answer must be."""
    with Engine(model, threads=1, max_batch_size=1, reuse_prefixes=False) as engine:
        yield engine
