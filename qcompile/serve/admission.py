"""The bounded queue: how many generations may be under way, and what one too many is told."""

from __future__ import annotations

import math

from qcompile.serve.api_error import ApiError

_MAX_RETRY_S = 60


class Admission:
    """Counts generations from the moment they are let in until they are done. Used in the event loop only.

    Args:
        num_slots: Generations that are computed together.
        max_queue: Generations that may wait beside those.
    """

    def __init__(self, num_slots: int, max_queue: int) -> None:
        self.capacity = num_slots + max_queue
        self.num_open = 0
        self.is_closed = False
        self._num_slots = num_slots
        self._mean_s = 1.0

    def take(self, count: int) -> None:
        """Let a request of `count` generations in.

        Raises:
            ApiError: 400 if it could never fit, 429 if it does not fit now, 503 if the server is shutting down.
        """
        if self.is_closed:
            raise ApiError(503, "the server is shutting down", "shutting_down", retry_after_s=_MAX_RETRY_S)
        if count > self.capacity:
            raise ApiError(
                400, f"{count} answers asked for at once; this server takes {self.capacity}", "too_many", "n"
            )
        if self.num_open + count > self.capacity:
            message = f"{self.num_open} generations are under way or waiting and {self.capacity} are allowed; try again"
            raise ApiError(429, message, "queue_full", retry_after_s=self.retry_after_s())
        self.num_open += count

    def give_back(self, count: int = 1, duration_s: float | None = None) -> None:
        """Note generations that are done, and how long one took."""
        self.num_open -= count
        if duration_s is not None:
            self._mean_s += 0.1 * (duration_s - self._mean_s)

    def retry_after_s(self) -> int:
        """Return in how many seconds a place may be free: a mean answer shared by the slots, 1 to 60."""
        return max(1, min(_MAX_RETRY_S, math.ceil(self._mean_s / self._num_slots)))
