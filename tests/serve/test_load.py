"""Many clients, clients that leave, a full queue, deadlines, failures and the end."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from qcompile.runtime import Engine, SamplingParams
from tests.serve.conftest import NAME, Running, running

CHAT = "/v1/chat/completions"
LONG: dict[str, Any] = {
    "model": NAME,
    "messages": [{"role": "user", "content": "Hello"}],
    "max_tokens": 400,
    "temperature": 0,
    "ignore_eos": True,
}


class Steps:
    """The engine's steps, held back or slowed down."""

    def __init__(self, engine: Engine) -> None:
        self._step = engine.step
        self._num_allowed = 0
        self.go = threading.Event()
        self.pause_s = 0.0
        self.failure: Exception | None = None
        engine.step = self.step  # type: ignore[method-assign]

    def allow(self, count: int) -> None:
        """Hold the engine back after so many more steps."""
        self._num_allowed = count
        self.go.set()

    def step(self) -> Any:
        assert self.go.wait(30)
        self._num_allowed -= 1
        if self._num_allowed == 0:
            self.go.clear()
        time.sleep(self.pause_s)
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        return self._step()


@contextmanager
def controlled(
    model: Path, *, held: bool = False, pause_s: float = 0.0, **options: Any
) -> Iterator[tuple[Running, Steps]]:
    with running(model, **options) as served:
        steps = Steps(served.engine)
        steps.pause_s = pause_s
        if not held:
            steps.go.set()
        try:
            yield served, steps
        finally:
            steps.pause_s = 0.0
            steps.go.set()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def events(answer: httpx.Response) -> Iterator[Any]:
    for line in answer.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def test_twelve_clients_get_what_one_alone_gets(server: Running, alone: Engine) -> None:
    requests = [(f"Question {i % 5}: " + "word " * (i * 7 % 40), 3 + 5 * i % 31) for i in range(24)]
    want = [
        alone.chat([{"role": "user", "content": text}], SamplingParams(max_new_tokens=count))[0].text
        for text, count in requests
    ]

    def ask(request: tuple[str, int]) -> str:
        text, count = request
        answer = server.openai.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": text}], max_tokens=count, temperature=0
        )
        return answer.choices[0].message.content or ""

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, requests)) == want


def test_a_full_queue_is_429_and_what_waits_is_served(model: Path) -> None:
    with controlled(model, held=True, batch=1, max_queue=1) as (served, steps), ThreadPoolExecutor(2) as pool:
        body = {**LONG, "max_tokens": 3}
        taken = [pool.submit(served.http.post, CHAT, json=body) for _ in range(2)]
        until(lambda: served.engine.has_work and served.engine.num_waiting == 2)
        refused = served.http.post(CHAT, json=body)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "queue_full"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        with pytest.raises(openai.RateLimitError):
            served.openai.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "x"}])
        steps.go.set()
        assert [one.result().json()["usage"]["completion_tokens"] for one in taken] == [3, 3]
        assert served.http.post(CHAT, json=body).status_code == 200


def test_a_client_that_leaves_frees_its_slot(model: Path) -> None:
    few = 4  # steps, so that however long this machine sleeps no answer gets near its end
    with controlled(model, held=True, batch=2) as (served, steps):
        steps.allow(few)
        with pytest.raises(httpx.ReadTimeout):
            served.http.post(CHAT, json=LONG, timeout=0.3)
        until(lambda: served.metric("qcompile_disconnects_total") == 1)
        steps.go.set()
        until(lambda: not served.engine.has_work)
        steps.go.clear()
        steps.allow(few)
        with served.http.stream("POST", CHAT, json={**LONG, "stream": True}) as answer:
            stream = events(answer)
            assert [next(stream)["object"] for _ in range(3)]
            assert served.engine.num_running == 1
        until(lambda: served.metric("qcompile_disconnects_total") == 2)
        steps.go.set()
        until(lambda: not served.engine.has_work)
        assert served.metric("qcompile_requests_total", path=CHAT, status="499") == 1
        assert served.metric("qcompile_generated_tokens_total") <= 2 * (few + 1)  # a first step reads the prompt too
        assert served.http.post(CHAT, json=LONG).json()["usage"]["completion_tokens"] == 400


def test_a_client_that_leaves_the_queue_is_forgotten(model: Path) -> None:
    with controlled(model, held=True, batch=1, max_queue=1) as (served, steps):
        with pytest.raises(httpx.ReadTimeout):
            served.http.post(CHAT, json=LONG, timeout=0.2)
        until(lambda: served.metric("qcompile_disconnects_total") == 1)
        steps.go.set()
        until(lambda: not served.engine.has_work)
        assert served.metric("qcompile_generated_tokens_total") == 0


def test_no_slot_within_the_longest_wait_is_503(model: Path) -> None:
    with controlled(model, held=True, batch=1, max_wait_s=0.2) as (served, steps):
        answer = served.http.post(CHAT, json={**LONG, "stream": True})
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "overloaded"
        assert "retry-after" in answer.headers
        steps.go.set()
        until(lambda: not served.engine.has_work)


def test_the_deadline_is_504_or_an_error_event(model: Path) -> None:
    with controlled(model, pause_s=0.02, deadline_s=0.4) as (served, _):
        answer = served.http.post(CHAT, json=LONG)
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "deadline_exceeded"
        with served.http.stream("POST", CHAT, json={**LONG, "stream": True}) as stream:
            assert stream.status_code == 200
            lines = [line for line in stream.iter_lines() if line]
        assert "deadline_exceeded" in lines[-1]
        with pytest.raises(openai.APIError, match="not complete"):
            list(
                served.openai.chat.completions.create(
                    model=NAME,
                    messages=[{"role": "user", "content": "x"}],
                    stream=True,
                    extra_body={"ignore_eos": True},
                )
            )
        until(lambda: not served.engine.num_running)


def test_a_step_that_fails_ends_its_requests_and_nothing_else(model: Path) -> None:
    with controlled(model, held=True) as (served, steps), ThreadPoolExecutor(1) as pool:
        body = {**LONG, "max_tokens": 5}
        hit = pool.submit(served.http.post, CHAT, json=body)
        until(lambda: served.engine.has_work)
        steps.failure = RuntimeError("broken on purpose")
        steps.go.set()
        assert hit.result().status_code == 500
        assert "broken on purpose" in hit.result().json()["error"]["message"]
        after = served.http.post(CHAT, json=body)
        assert after.json()["usage"]["completion_tokens"] == 5
        assert served.http.get("/health").status_code == 200


def test_shutdown_refuses_what_is_new_and_finishes_what_was_taken(model: Path, alone: Engine) -> None:
    want = alone.chat(LONG["messages"], SamplingParams(max_new_tokens=60, ignore_eos=True))[0].text
    with controlled(model, held=True) as (served, steps), httpx.Client(trust_env=False) as other:
        steps.allow(5)
        with served.http.stream("POST", CHAT, json={**LONG, "stream": True, "max_tokens": 60}) as answer:
            stream = events(answer)
            pieces = [next(stream), next(stream)]
            served.server.stop()
            until(lambda: other.get(served.root + "/health").status_code == 503)
            refused = other.post(served.root + CHAT, json=LONG)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "shutting_down"
            steps.go.set()
            pieces.extend(stream)
        assert "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces) == want
        assert pieces[-1]["choices"][0]["finish_reason"] == "length"


def test_grace_that_runs_out_tells_the_rest(model: Path) -> None:
    with controlled(model, pause_s=0.05, grace_s=0.3) as (served, _):
        with served.http.stream("POST", CHAT, json={**LONG, "stream": True}) as answer:
            stream = events(answer)
            next(stream)
            served.server.stop()
            last = list(stream)[-1]
        assert last["error"]["code"] == "shutting_down"
