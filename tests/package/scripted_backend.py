"""A back end for the contest loop whose every step is decided by a test."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from qcompile.runtime import Completion, Delta, SamplingParams

Answer = Callable[[str, SamplingParams], str]


class ScriptedBackend:
    """Answers a question after a few steps; texts are decided by `answer`, failures by what it raises.

    Args:
        answer: Question text and sampling to the answer; an exception it raises ends the whole step.
        on_step: Called at the beginning of every step.
    """

    tokenizer: Any = SimpleNamespace(has_chat_template=True)

    def __init__(self, answer: Answer, on_step: Callable[[], None] = lambda: None) -> None:
        self.answer = answer
        self.on_step = on_step
        self.asked: list[str] = []
        self.is_closed = False
        self._numbers = itertools.count()
        self._running: dict[int, tuple[str, SamplingParams]] = {}

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        return str(messages[-1]["content"])

    def add_request(self, prompt: str, params: SamplingParams) -> int:
        number = next(self._numbers)
        self.asked.append(prompt)
        self._running[number] = (prompt, params)
        return number

    def abort(self, request_id: int) -> None:
        self._running.pop(request_id, None)

    def step(self) -> list[Delta]:
        self.on_step()
        try:
            texts = {number: self.answer(*one) for number, one in self._running.items()}
        except BaseException:
            self._running.clear()
            raise
        if not self._running:
            return []
        number = next(iter(self._running))  # one is finished at a step
        self._running.pop(number)
        text = texts[number]
        if text == "ERROR":
            completion = Completion(0, "", [], "error", error="the device said no")
        else:
            completion = Completion(0, text, [1, 2, 3], "stop", num_prompt_tokens=5, duration_s=0.5)
        return [Delta(number, 0, text, (1,), completion)]

    def close(self) -> None:
        self.is_closed = True
