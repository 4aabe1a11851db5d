"""What strangers send: one clear answer each, in OpenAI's shape, and the server goes on."""

import json
import socket
from typing import Any

import httpx
import openai
import pytest

from tests.serve.conftest import KEY, NAME, Running, running

CHAT = "/v1/chat/completions"
GOOD: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
JSON = {"content-type": "application/json"}


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    record = answer.json()
    assert set(record) == {"error"}
    assert set(record["error"]) == {"message", "type", "param", "code"}
    assert record["error"]["message"]
    return dict(record["error"])


def with_fields(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in {**GOOD, **fields}.items() if value != "drop"}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"model": "drop"}, "model", "missing"),
        ({"messages": "drop"}, "messages", "missing"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "Hi"}, "messages", "list"),
        ({"messages": ["Hi"]}, "messages.0", "Message"),
        ({"messages": [{"role": "king", "content": "Hi"}]}, "messages.0.role", "king"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "got 5"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "text"),
        ({"max_tokens": -1}, "max_tokens", "got -1"),
        ({"max_tokens": 0}, "max_tokens", "got 0"),
        ({"max_tokens": "9"}, "max_tokens", "integer"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"max_tokens": 1.5}, "max_tokens", "integer"),
        ({"temperature": 3}, "temperature", "got 3"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"repetition_penalty": 1e-320}, "repetition_penalty", "0.0001"),
        ({"n": 0}, "n", "got 0"),
        ({"n": 10**30}, "n", "128"),
        ({"n": 128}, "n", "takes"),
        ({"seed": 1 << 80}, "seed", "got"),
        ({"stop": 7}, "stop", "text"),
        ({"stop": [""]}, "stop", "characters"),
        ({"stop": ["x"] * 17}, "stop", "16"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream = true"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs = true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"temprature": 1}, "temprature", "unknown field"),
        ({"chat_template": "{{ 1 }}"}, "chat_template", "unknown field"),
        ({"chat_template_kwargs": {"tools": "x"}}, "chat_template_kwargs.tools", "unknown field"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "UTF-8"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, "messages", "context"),
    ],
)
def test_a_wrong_field_is_named(server: Running, fields: dict[str, Any], param: str, words: str) -> None:
    error = error_of(server.http.post(CHAT, content=json.dumps(with_fields(**fields)), headers=JSON), 400)
    assert error["param"] == param
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "'prompt' is missing"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": ""}, "empty"),
        ({"prompt": [1, 1 << 40]}, "token id"),
        ({"prompt": [-1]}, "token id"),
        ({"prompt": "a", "logprobs": 6}, "logprobs"),
        ({"prompt": "a", "echo": True}, "not supported"),
        ({"prompt": "a", "messages": []}, "unknown field"),
    ],
)
def test_a_wrong_text_request(server: Running, fields: dict[str, Any], words: str) -> None:
    error = error_of(server.http.post("/v1/completions", json={"model": NAME, **fields}), 400)
    assert words in error["message"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"hello", "not JSON"),
        (b"[1]", "object"),
        (b'"text"', "object"),
        (b'{"model": "\xff\xfe"}', "UTF-8 at byte 11"),
        (b'{"temperature": NaN}', "NaN"),
        (b"[" * 200_000, "nested"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
)
def test_a_body_that_is_no_request(server: Running, body: bytes, words: str) -> None:
    assert words in error_of(server.http.post(CHAT, content=body, headers=JSON), 400)["message"]


def test_neutral_and_harmless_fields_pass(server: Running) -> None:
    fields = {
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "tools": [],
        "user": "u",
        "store": False,
    }
    assert server.http.post(CHAT, json={**GOOD, **fields, "response_format": {"type": "text"}}).status_code == 200


def test_another_model_is_404(server: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        server.openai.chat.completions.create(**{**GOOD, "model": "gpt-x"})
    assert error_of(server.http.get("/v1/models/../x"), 404)["code"] in {"model_not_found", "not_found"}


def test_ten_megabytes_are_413(server: Running) -> None:
    body = json.dumps(with_fields(messages=[{"role": "user", "content": "a" * 10_000_000}]))
    assert error_of(server.http.post(CHAT, content=body, headers=JSON), 413)["code"] == "request_too_large"

    def pieces() -> Any:
        for _ in range(100):
            yield b"x" * 100_000

    assert error_of(server.http.post(CHAT, content=pieces(), headers=JSON), 413)


def test_a_hopelessly_long_text_is_refused_before_it_is_cut(server: Running) -> None:
    body = with_fields(messages=[{"role": "user", "content": "a" * 1_500_000}])
    error = error_of(server.http.post(CHAT, json=body), 400)
    assert error["code"] == "context_length_exceeded"
    assert "more than" in error["message"]


def test_paths_methods_and_types(server: Running) -> None:
    assert error_of(server.http.get("/nowhere"), 404)["code"] == "not_found"
    assert error_of(server.http.get(CHAT), 405)["code"] == "method_not_allowed"
    assert "application/json" in error_of(server.http.post(CHAT, content=b"{}"), 415)["message"]


def test_jinja_in_a_message_is_text(server: Running) -> None:
    content = "{{ 7 * 191 }}{% for i in range(9) %}x{% endfor %}"
    answer = server.http.post(CHAT, json={**GOOD, "messages": [{"role": "user", "content": content}]}).json()
    ids = server.engine.encode_chat([{"role": "user", "content": content}])
    assert content in server.engine.tokenizer.decode(ids)
    assert answer["usage"]["prompt_tokens"] == len(ids)


def test_without_a_token_only_this_machine_is_served(server: Running) -> None:
    answer = server.http.get("/v1/models", headers={"host": "evil.example:80"})
    assert error_of(answer, 403)["code"] == "wrong_host"
    for host in ("localhost", "localhost:1", "127.0.0.1:9", "[::1]:9", "[::1]"):
        assert server.http.get("/v1/models", headers={"host": host}).status_code == 200


def test_bearer_token(model: Any) -> None:
    with running(model, api_key=KEY) as served:
        assert served.openai.models.list().data
        bare = httpx.Client(base_url=served.root, trust_env=False)
        with bare:
            for value in ("", f"Basic {KEY}", "Bearer", "Bearer wrong", f"Bearer {KEY}x", "Bearer \u00e9"):
                answer = bare.get("/v1/models", headers={"authorization": value.encode("utf-8")})
                assert error_of(answer, 401)["type"] == "authentication_error"
                assert answer.headers["www-authenticate"] == "Bearer"
            assert bare.get("/health").status_code == 200
            assert bare.get("/metrics").status_code == 401
            assert bare.post(CHAT, json=GOOD).status_code == 401


def test_a_body_that_does_not_come_is_408(model: Any) -> None:
    with running(model, body_timeout_s=0.2) as served:
        host, port = served.root.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
            connection.sendall(head.encode() + b'{"model":')
            answer = b""
            while piece := connection.recv(65536):
                answer += piece
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"did not arrive" in answer
