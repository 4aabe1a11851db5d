"""The clock: one budget for all test files, of which every file gets its share."""

from typing import Callable


class Budget:
    """Shares out the seconds that all calls of `get_results` may take together.

    A file gets the part of what is left that its questions are of those still expected; what it does not use is left
    for the next. Beyond the expected number of questions a file gets half of what is left.

    Args:
        total_s: Seconds for all files together.
        expected_questions: Questions of all files together.
        clock: Monotonic seconds.
    """

    def __init__(self, total_s: float, expected_questions: int, clock: Callable[[], float]) -> None:
        self._left_s = total_s
        self._expected = expected_questions
        self._clock = clock
        self._started = 0.0

    def start(self, num_questions: int) -> float:
        """Begin a file; returns the moment at which its answers must be ready."""
        self._started = self._clock()
        share = 1.0
        if num_questions < self._expected:
            share = num_questions / self._expected
        elif self._expected <= 0:
            share = 0.5
        self._expected -= num_questions
        return self._started + max(0.0, self._left_s) * share

    def stop(self) -> float:
        """End a file; returns the seconds it took."""
        took = self._clock() - self._started
        self._left_s -= took
        return took
