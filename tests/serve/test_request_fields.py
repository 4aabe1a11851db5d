"""Whatever JSON comes: a checked request, or an error that can be sent."""

import json
from typing import Any

import pytest

from qcompile.serve.api_error import ApiError
from qcompile.serve.request_body import parse_json, validated
from qcompile.serve.requests import ChatRequest, GenerationRequest, TextRequest

# fmt: off
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 1 << 70, -(1 << 70), 0.0, 0.5, -0.5, 1e308, float("inf"), "", "a", "\ud800", "\n", "x" * 5000,
    [], [1], ["a"], [[1]], [[]], [None], [{}], [{"role": "user"}], [{"role": "user", "content": [{"type": "text"}]}],
    {}, {"a": 1}, {"include_usage": 1}, {"type": "text"}, [1 << 70], ["a"] * 100, [True], {"\ud800": {"deep": [[[[]]]]}},
]
# fmt: on
GOOD: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi"}


def refusal(record: dict[str, Any], kind: type[GenerationRequest]) -> ApiError | None:
    try:
        request = validated(record, kind)
    except ApiError as error:
        return error
    assert request.num_choices >= 1
    assert request.most_tokens is None or request.most_tokens >= 1
    assert isinstance(request.stop, tuple)
    return None


@pytest.mark.parametrize("kind", [ChatRequest, TextRequest])
def test_any_value_is_taken_or_named(kind: type[GenerationRequest]) -> None:
    good = {name: value for name, value in GOOD.items() if name in kind.model_fields}
    assert refusal(good, kind) is None
    num_refused = 0
    for name in (*kind.model_fields, "unknown", "\ud800"):
        for value in VALUES:
            error = refusal({**good, name: value}, kind)
            if error is None:
                continue
            num_refused += 1
            assert (error.status, error.param is None) == (400, False), (name, value)
            message = json.loads(error.response().body)["error"]["message"]
            assert 0 < len(message) < 400, (name, value)
            assert "\n" not in message, (name, value)
    assert num_refused > 15 * len(kind.model_fields)


@pytest.mark.parametrize("cut", range(0, 60, 3))
def test_a_body_that_was_cut_off(cut: int) -> None:
    body = json.dumps(GOOD, ensure_ascii=False).encode()[:cut]
    with pytest.raises(ApiError, match="not JSON"):
        parse_json(body)


@pytest.mark.parametrize("value", [None, 0, 0.0])
def test_values_that_change_nothing(value: Any) -> None:
    record = {"model": "m", "prompt": "Hi", "presence_penalty": value, "max_tokens": None, "stop": None, "n": None}
    assert validated(record, TextRequest).most_tokens == 16


@pytest.mark.parametrize("value", [False, "0", 0.1, [], {}])
def test_values_that_would_change_something(value: Any) -> None:
    with pytest.raises(ApiError, match="not supported"):
        validated({"model": "m", "prompt": "Hi", "presence_penalty": value}, TextRequest)
