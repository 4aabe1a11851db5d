"""Read a request's body and make a checked request of it."""

from __future__ import annotations

import asyncio
import json
from typing import Any, TypeVar

from fastapi import Request
from pydantic import ValidationError

from qcompile.serve.api_error import ApiError
from qcompile.serve.requests import ChatRequest, GenerationRequest
from qcompile.serve.settings import ServeSettings

R = TypeVar("R", bound=GenerationRequest)
_MAX_SHOWN = 60
_MAX_DROPPED_BYTES = 64 << 20


async def read_request(request: Request, kind: type[R], settings: ServeSettings) -> R:
    """Return the body as a request of that kind.

    Raises:
        ApiError: Too large, too slow, not JSON, or a field is wrong; 404 for another model.
        ClientDisconnect: The client left before the body was complete.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        # moreover: a page in a browser cannot send this type to a local server without asking it first
        raise ApiError(415, f"content-type '{media_type[:_MAX_SHOWN]}'; application/json is wanted")
    try:
        body = await asyncio.wait_for(_read(request, settings.max_body_bytes), settings.body_timeout_s)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not arrive within {settings.body_timeout_s:g} seconds") from None
    parsed = validated(parse_json(body), kind)
    if parsed.model != settings.model_name:
        shown = parsed.model[:_MAX_SHOWN]
        message = f"the model '{shown}' does not exist; this server has '{settings.model_name}'"
        raise ApiError(404, message, "model_not_found", "model")
    return parsed


async def _read(request: Request, limit: int) -> bytes:
    """Return the body. What is too large is read to its end and dropped: a client that still writes hears no answer."""
    declared = request.headers.get("content-length", "0")
    body, size_bytes = bytearray(), 0
    if len(declared) > len(str(_MAX_DROPPED_BYTES)) or int(declared) > _MAX_DROPPED_BYTES:
        raise _too_large(limit)
    async for piece in request.stream():
        size_bytes += len(piece)
        if size_bytes <= limit:
            body += piece
        elif size_bytes > _MAX_DROPPED_BYTES:
            break
    if size_bytes > limit:
        raise _too_large(limit)
    return bytes(body)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than the {limit} bytes this server takes", "request_too_large")


def parse_json(body: bytes) -> dict[str, Any]:
    """Return the JSON object in a body.

    Raises:
        ApiError: It is not UTF-8, not JSON, or not an object.
    """
    try:
        record = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not valid UTF-8 at byte {error.start}", "invalid_utf8") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", "invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}", "invalid_json") from None
    if not isinstance(record, dict):
        raise ApiError(400, f"a JSON object is wanted, got {type(record).__name__}", "invalid_json")
    return record


def validated(record: dict[str, Any], kind: type[R]) -> R:
    """Return the checked request.

    Raises:
        ApiError: A field is missing, unknown, of the wrong type or out of range; the first one is named.
    """
    try:
        request = kind.model_validate(record)
    except ValidationError as failure:
        raise _field_error(failure) from None
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options: only with stream = true", "invalid_value", "stream_options")
    if isinstance(request, ChatRequest) and request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs: only with logprobs = true", "invalid_value", "top_logprobs")
    return request


def _field_error(failure: ValidationError) -> ApiError:
    first = failure.errors(include_url=False, include_context=False)[0]
    param = ".".join(str(part) for part in first["loc"])[:_MAX_SHOWN]
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field '{param}'", "unknown_parameter", param)
    if first["type"] == "missing":
        return ApiError(400, f"'{param}' is missing", "missing_required_parameter", param)
    seen = repr(first["input"])
    shown = seen if len(seen) <= _MAX_SHOWN else seen[:_MAX_SHOWN] + "..."
    reason = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param}: {reason}, got {shown}", "invalid_value", param)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
