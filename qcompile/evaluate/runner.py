"""Generate the texts of all cases, together, keeping each in the journal as soon as it is finished.

Requests go to the engine's continuous scheduler, never more than it computes together: a place that becomes free is
filled at once, and TTFT is the time to the first token of a request that is being served, not the length of the queue.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qcompile.evaluate.cases import Case
from qcompile.evaluate.interrupt import deferred_interrupt
from qcompile.evaluate.journal import Journal
from qcompile.evaluate.sample import Sample
from qcompile.evaluate.settings import EvalSettings, digest_of
from qcompile.evaluate.templates import Templates
from qcompile.runtime.errors import QCompileError

if TYPE_CHECKING:
    from qcompile.runtime import Completion, Engine

Progress = Callable[[int, int, int], None]  # finished texts, texts in all, tokens of this session


@dataclass(frozen=True)
class Request:
    """One text that is wanted: the case, the number of the text, its prompt and its key in the journal."""

    case: Case
    sample: int
    prompt_ids: tuple[int, ...]
    options: dict[str, Any]
    key: str


@dataclass(frozen=True)
class Refusal:
    """Why a text could not be generated."""

    case: Case
    sample: int
    message: str


def make_requests(
    engine: "Engine", cases: Iterable[Case], templates: Templates, settings: EvalSettings
) -> tuple[list[Request], list[Refusal]]:
    """Every text that is wanted, in the order of the cases; a case whose prompt cannot be made is refused."""
    requests: list[Request] = []
    refusals: list[Refusal] = []
    for case in cases:
        try:
            prompt_ids = tuple(encode_case(engine, case, templates, settings))
        except QCompileError as error:
            refusals.append(Refusal(case, 0, str(error)))
            continue
        for sample in range(settings.num_samples(case)):
            options = settings.sampling(case, sample)
            key = digest_of(case.id, case.type, sample, prompt_ids, options)[:32]
            requests.append(Request(case, sample, prompt_ids, options, key))
    return requests, refusals


def encode_case(engine: "Engine", case: Case, templates: Templates, settings: EvalSettings) -> list[int]:
    """The prompt ids of a case: through the chat template, or as plain text where there is none."""
    messages = templates.messages(case)
    if settings.is_raw or not engine.tokenizer.has_chat_template:
        return engine.tokenizer.encode("\n\n".join(message["content"] for message in messages))
    return engine.encode_chat(messages, **settings.template_arguments)


class Runner:
    """Runs what the journal does not hold yet.

    Args:
        engine: A loaded model.
        journal: Gets every finished text.
        batch_size: Requests in flight; the engine's own `max_batch_size`.
    """

    def __init__(self, engine: "Engine", journal: Journal, batch_size: int) -> None:
        self._engine = engine
        self._journal = journal
        self._batch_size = batch_size
        self._in_flight: dict[int, Request] = {}
        self._refusals: list[Refusal] = []
        self._started = 0.0
        self.num_tokens = 0

    def run(self, requests: Sequence[Request], progress: Progress = lambda *_: None) -> list[Refusal]:
        """Generate what is missing.

        Returns:
            The texts that could not be generated.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed; everything finished until then is in the journal.
            EvaluateError: The journal cannot be written.
        """
        waiting = deque(request for request in requests if request.key not in self._journal.samples)
        num_finished = len(requests) - len(waiting)
        self._started = time.perf_counter()
        progress(num_finished, len(requests), 0)
        with deferred_interrupt() as is_interrupted:
            while waiting or self._in_flight:
                self._submit(waiting)
                num_finished += self._step()
                progress(num_finished, len(requests), self.num_tokens)
                if is_interrupted():
                    self._abandon()
                    raise KeyboardInterrupt
        return self._refusals

    def _submit(self, waiting: deque[Request]) -> None:
        from qcompile.runtime import SamplingParams

        while waiting and len(self._in_flight) < self._batch_size:
            request = waiting.popleft()
            try:
                number = self._engine.add_request(request.prompt_ids, SamplingParams(**request.options))
            except QCompileError as error:  # longer than the context
                self._refuse(request, str(error))
                continue
            self._in_flight[number] = request

    def _step(self) -> int:
        num_finished = 0
        for delta in self._engine.step():
            self.num_tokens += len(delta.token_ids)
            if delta.completion is not None:
                self._finish(self._in_flight.pop(delta.request_id), delta.completion)
                num_finished += 1
        return num_finished

    def _finish(self, request: Request, completion: "Completion") -> None:
        if completion.finish_reason not in ("stop", "length"):
            self._refuse(request, completion.error or completion.finish_reason)
            return
        sample = Sample(
            text=completion.text,
            finish_reason=completion.finish_reason,
            num_prompt_tokens=completion.num_prompt_tokens,
            num_new_tokens=len(completion.token_ids),
            ttft_s=round(completion.ttft_s, 6),
            duration_s=round(completion.duration_s, 6),
        )
        self._journal.add_sample(request.key, sample, round(time.perf_counter() - self._started, 6))

    def _refuse(self, request: Request, message: str) -> None:
        self._refusals.append(Refusal(request.case, request.sample, message))

    def _abandon(self) -> None:
        for number in self._in_flight:
            self._engine.abort(number)
        self._in_flight.clear()
