"""The loop: every question's first text, then further texts for code, until all are there or time is up.

The model answers in a batch that is refilled at every step. When a step fails, the texts it was computing are asked
again in halves, so that one question that breaks the model costs no other its answer. When one fails all alone, a tiny
known question tells whose fault it was: if the back end fails that too, it is left for the next rung.
"""

import threading
from collections import deque
from dataclasses import dataclass
from typing import Any, Callable, Deque, Dict, List

from qcompile.evaluate.asking import sampling_options, seed_of
from qcompile.package.contest.answers import MANY, Answers
from qcompile.package.contest.ladder import Backend, Ladder, encode_question
from qcompile.package.contest.questions import Question
from qcompile.package.contest.record import Record
from qcompile.package.contest.settings import ContestSettings
from qcompile.runtime import SamplingParams

_KNOWN_QUESTION = ({"role": "user", "content": "1 + 1 = ?"},)
_KNOWN_TOKENS = 2


@dataclass(frozen=True)
class Wanted:
    """One text that is wanted."""

    question: Question
    sample: int


class Loop:
    """Answers one test file.

    Args:
        ladder: The ways to run the model.
        answers: Takes the texts.
        settings: Of the package.
        record: The log.
        clock: Monotonic seconds.
        deadline: When to stop.
        stop: Set from outside to stop at the next step.
    """

    def __init__(
        self,
        ladder: Ladder,
        answers: Answers,
        settings: ContestSettings,
        record: Record,
        clock: Callable[[], float],
        deadline: float,
        stop: threading.Event,
    ) -> None:
        self._ladder = ladder
        self._answers = answers
        self._settings = settings
        self._record = record
        self._clock = clock
        self._deadline = deadline
        self._stop = stop
        self._waiting = self._in_order()
        self._groups: Deque[List[Wanted]] = deque()  # of texts whose batch failed; tried one group at a time
        self._in_flight: Dict[int, Wanted] = {}
        self._is_group = False  # what is in flight is such a group, and nothing may join it

    def run(self) -> str:
        """Answer until nothing is left or time is up; returns why it ended."""
        while self._waiting or self._groups or self._in_flight:
            if self._stop.is_set() or self._clock() >= self._deadline:
                self._abandon()
                return "asked to stop" if self._stop.is_set() else "out of time"
            backend = self._ladder.climb()
            if backend is None:
                return "no way to run the model is left"
            try:
                self._submit(backend)
                self._step(backend)
            except Exception as error:
                self._after_failure(f"{type(error).__name__}: {error}")
        return "done"

    def _in_order(self) -> Deque[Wanted]:
        """First texts before further ones, types with short answers before those with long ones."""
        wanted = []
        for question in self._answers.questions:
            if question.problem:
                self._record.warn("unanswerable", f"question {question.id!r}: {question.problem}", id=question.id)
                continue
            samples = self._settings.samples if question.type == MANY else 1
            wanted += [Wanted(question, sample) for sample in range(samples)]
        limits = self._settings.max_new_tokens
        wanted.sort(key=lambda one: (one.sample, limits[one.question.type], one.question.place))
        return deque(wanted)

    def _submit(self, backend: Backend) -> None:
        if not self._in_flight:
            self._is_group = bool(self._groups)
            for one in self._groups.popleft() if self._groups else ():
                self._add(backend, one)
        while self._waiting and not self._is_group and len(self._in_flight) < self._settings.batch_size:
            self._add(backend, self._waiting.popleft())

    def _add(self, backend: Backend, one: Wanted) -> None:
        settings, question = self._settings, one.question
        temperature = settings.temperature_of(one.sample)
        seed = seed_of(settings.seed, str(question.id), one.sample)
        options = sampling_options(settings.max_new_tokens[question.type], temperature, settings.top_p, seed)
        self._answers.begin(question)
        try:
            prompt = encode_question(backend, question.messages, **settings.template_arguments)
            self._in_flight[backend.add_request(prompt, SamplingParams(**options))] = one
        except Exception as error:
            self._give_up(one, f"{type(error).__name__}: {error}")

    def _step(self, backend: Backend) -> None:
        if not self._in_flight:
            return
        for delta in backend.step():
            if delta.completion is None:
                continue
            one = self._in_flight.pop(delta.request_id, None)
            if one is not None:
                self._finish(one, delta.completion)

    def _finish(self, one: Wanted, completion: Any) -> None:
        if completion.finish_reason not in ("stop", "length"):
            self._after_lone_failure(one, str(completion.error), was_alone=self._is_group and not self._in_flight)
            return
        self._answers.add(one.question, one.sample, completion.text, len(completion.token_ids))
        self._record.note(
            "text",
            id=one.question.id,
            type=one.question.type,
            sample=one.sample,
            backend=self._ladder.name,
            finish_reason=completion.finish_reason,
            prompt_tokens=completion.num_prompt_tokens,
            new_tokens=len(completion.token_ids),
            seconds=round(completion.duration_s, 6),
        )

    def _after_failure(self, reason: str) -> None:
        failed = list(self._in_flight.values())
        self._in_flight.clear()
        if len(failed) > 1:
            self._record.warn("step failed", f"{reason}; {len(failed)} texts are asked again in halves")
            middle = len(failed) // 2
            self._groups.extendleft((failed[middle:], failed[:middle]))
        elif failed:
            self._after_lone_failure(failed[0], reason, was_alone=True)

    def _after_lone_failure(self, one: Wanted, reason: str, was_alone: bool) -> None:
        if not was_alone:
            self._record.warn("text failed", f"question {one.question.id!r}: {reason}; it is asked again alone")
            self._groups.append([one])
        elif self._is_backend_well():
            self._give_up(one, reason)
        else:
            self._ladder.leave(reason)
            self._groups.append([one])

    def _is_backend_well(self) -> bool:
        backend = self._ladder.backend
        if backend is None:
            return False
        try:
            params = SamplingParams(max_new_tokens=_KNOWN_TOKENS)
            number = backend.add_request(encode_question(backend, _KNOWN_QUESTION), params)
            while self._clock() < self._deadline:
                for delta in backend.step():
                    if delta.request_id == number and delta.completion is not None:
                        return delta.completion.finish_reason in ("stop", "length")
        except Exception as error:
            self._record.note("back end is not well", backend=self._ladder.name, error=repr(error))
            return False
        return True

    def _give_up(self, one: Wanted, reason: str) -> None:
        message = f"question {one.question.id!r}, text {one.sample + 1}: {reason}"
        self._record.warn("not answered", message, id=one.question.id, sample=one.sample)

    def _abandon(self) -> None:
        backend = self._ladder.backend
        if backend is not None:
            for number in self._in_flight:
                backend.abort(number)
        self._in_flight.clear()
