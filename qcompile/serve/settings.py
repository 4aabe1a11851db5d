"""What a server is told when it starts."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from qcompile.errors import ServeError

REASONING = ("none", "think", "think-answer")


@dataclass(frozen=True)
class ServeSettings:
    """How requests are taken and answered.

    Attributes:
        model_name: What requests call the model.
        api_key: The bearer token; None needs a loopback address.
        reasoning: ``none``: the text as it is. ``think``: what stands in <think> goes to reasoning_content.
            ``think-answer``: moreover the tags <answer> and </answer> are left out of the content.
        max_queue: The most generations that wait for a slot; one more is refused with 429.
        max_wait_s: The longest wait for a first token; then 503.
        deadline_s: The longest time from a request to the end of its answer; then 504.
        max_body_bytes: The largest request body; a larger one is refused with 413.
        body_timeout_s: The longest time for a request body to arrive; then 408.
    """

    model_name: str
    api_key: str | None = None
    reasoning: str = "none"
    max_queue: int = 64
    max_wait_s: float = 60.0
    deadline_s: float = 600.0
    max_body_bytes: int = 2 << 20
    body_timeout_s: float = 30.0


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_exposure(host: str, api_key: str | None) -> None:
    """Refuse to open a server without a token to other machines.

    Raises:
        ServeError: No token and an address that is not loopback, or a token that no header can carry.
    """
    if api_key is None:
        if not is_loopback(host):
            raise ServeError(
                f"--host {host} can be reached from other machines and no token is set: set QCOMPILE_API_KEY or "
                "--api-key-file, or use 127.0.0.1"
            )
    elif not api_key.isascii() or not api_key.isprintable() or " " in api_key or not api_key:
        raise ServeError("the API key must be printable ASCII without spaces")
