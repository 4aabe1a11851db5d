"""Errors as OpenAI's clients expect them: a status, and {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
from typing import Any

from fastapi import Response

_TYPES = {401: "authentication_error", 429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error"}


class ApiError(Exception):
    """One refused or failed request.

    Args:
        status: The HTTP status.
        message: What, where, seen and wanted.
        code: A word for programs, such as ``context_length_exceeded``.
        param: The field at fault.
        retry_after_s: When to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = " ".join(message.split())
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """Return the error object."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Return the headers that belong to it."""
        headers = {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(self.retry_after_s)
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.status in {408, 413}:
            headers["connection"] = "close"  # the rest of the body is not read
        return headers

    def response(self) -> Response:
        """Return it as an HTTP response."""
        return json_response(self.body(), self.status, self.headers())


def json_response(record: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a JSON response; what a client sent and an error repeats may hold lone surrogates."""
    return Response(dump(record), status, headers, "application/json")


def dump(record: dict[str, Any]) -> bytes:
    """Return compact JSON in UTF-8."""
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", errors="replace")
