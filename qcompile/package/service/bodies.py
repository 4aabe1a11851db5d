"""The body of a request: parsed JSON, bytes, text, or a form with one JSON file in it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

from qcompile.runtime import RequestError

MAX_BODY_BYTES = 1 << 20
MAX_NEW_TOKENS = 1024
_SAMPLING = ("temperature", "top_p", "top_k", "seed", "stop")
_KNOWN = {"prompt", "messages", "max_new_tokens", *_SAMPLING}


@dataclass(frozen=True)
class Job:
    """One text that is asked for.

    Attributes:
        messages: The chat; None for a plain prompt.
        prompt: The plain prompt.
        options: In the words of `SamplingParams`.
    """

    messages: Optional[List[Dict[str, Any]]]
    prompt: str
    options: Dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Body:
    """A request: its jobs, and whether they came as a list in `data.req_data`."""

    jobs: List[Job]
    is_list: bool


def read_body(body: Any) -> Body:
    """Read a request's body.

    Args:
        body: A dict, JSON as bytes or text, or a form: `{field: {file name: file}}`.

    Raises:
        RequestError: It is none of these, or a field is missing, unknown or of the wrong kind.
    """
    record = _decoded(body)
    if not isinstance(record, Mapping):
        raise RequestError(f"a JSON object is wanted, got {type(record).__name__}")
    record = _form(record)
    inner = record.get("data")
    if isinstance(inner, Mapping) and isinstance(inner.get("req_data"), list):
        if not inner["req_data"]:
            raise RequestError("data.req_data is empty")
        return Body([_job(entry, f"data.req_data[{i}]") for i, entry in enumerate(inner["req_data"])], True)
    return Body([_job(record, "the request")], False)


def _decoded(body: Any) -> Any:
    if hasattr(body, "read"):
        body = body.read(MAX_BODY_BYTES + 1)
    if isinstance(body, (bytes, bytearray, str)):
        if len(body) > MAX_BODY_BYTES:
            raise RequestError(f"the body is larger than {MAX_BODY_BYTES} bytes")
        try:
            return json.loads(body if isinstance(body, str) else bytes(body).decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the body is not JSON in UTF-8: {error}") from None
    return body


def _form(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """A form's only file is the request."""
    if len(record) == 1 and "prompt" not in record and "messages" not in record:
        inner = next(iter(record.values()))
        if isinstance(inner, Mapping) and len(inner) == 1 and hasattr(next(iter(inner.values())), "read"):
            decoded = _decoded(next(iter(inner.values())))
            if isinstance(decoded, Mapping):
                return decoded
    return record


def _job(entry: Any, where: str) -> Job:
    if not isinstance(entry, Mapping):
        raise RequestError(f"{where}: a JSON object is wanted, got {type(entry).__name__}")
    unknown = [str(key) for key in entry if key not in _KNOWN]
    if unknown:
        raise RequestError(f"{where}: '{unknown[0][:60]}' is unknown; there are {', '.join(sorted(_KNOWN))}")
    prompt, messages = entry.get("prompt"), entry.get("messages")
    if (prompt is None) == (messages is None):
        raise RequestError(f"{where}: either 'prompt' or 'messages' is wanted")
    if messages is None and (not isinstance(prompt, str) or not prompt.strip()):
        raise RequestError(f"{where}: 'prompt' must be a text")
    if messages is not None and not isinstance(messages, list):
        raise RequestError(f"{where}: 'messages' must be a list")
    limit = entry.get("max_new_tokens", 512)
    if isinstance(limit, bool) or not isinstance(limit, int) or not 0 < limit <= MAX_NEW_TOKENS:
        raise RequestError(f"{where}: 'max_new_tokens' must be a number from 1 to {MAX_NEW_TOKENS}, got {limit!r}")
    options = {name: entry[name] for name in _SAMPLING if entry.get(name) is not None}
    return Job(messages, prompt or "", {"max_new_tokens": limit, **options})
