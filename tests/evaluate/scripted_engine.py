"""An engine that answers from a script: the runner's counterpart in tests, with the timing of a real one."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qcompile.runtime.completion import Completion, Delta
from qcompile.runtime.errors import RequestError, TokenizerError

Answer = Callable[[str, Any], str]  # the prompt and the sampling parameters to the text


def right_form(answer: str) -> str:
    return f"<think>\nx\n</think>\n<answer>{answer}</answer>"


class ScriptedEngine:
    """Takes a request at a time, gives one token a step; a text of n characters needs n // 8 + 1 steps.

    Args:
        directory: Gets a small `qcompile.json`, whose hash is the model's.
        answer: Says the text for a prompt.
        fail: Prompts with this text end in an error.
        interrupt_after: Press Ctrl-C after that many finished texts.
    """

    def __init__(
        self,
        directory: Path,
        answer: Answer,
        *,
        fail: str = "\0",
        interrupt_after: int | None = None,
        has_chat_template: bool = True,
        max_chars: int = 10_000,
    ) -> None:
        directory.mkdir(exist_ok=True)
        if not (directory / "qcompile.json").exists():
            (directory / "qcompile.json").write_text("{}")
        self.path = directory
        self.manifest = SimpleNamespace(
            model=SimpleNamespace(model_type="qwen3"),
            target="ort",
            quantization={},
            graphs=(SimpleNamespace(io=SimpleNamespace(dtype="float32")),),
            build={},
        )
        self.tokenizer = SimpleNamespace(has_chat_template=has_chat_template, encode=lambda text: [*text.encode()])
        self.asked: list[tuple[str, Any]] = []
        self.most_in_flight = 0
        self._answer, self._fail, self._max_chars = answer, fail, max_chars
        self._interrupt_after = interrupt_after
        self._running: dict[int, list[Any]] = {}
        self._finished = 0

    def encode_chat(self, messages: Sequence[dict[str, str]], **variables: Any) -> list[int]:
        text = json.dumps({"messages": messages, **variables}, ensure_ascii=False)
        if "template-raises" in text:
            raise TokenizerError("the template raised: no")
        return [*text.encode()]

    def add_request(self, prompt: Sequence[int], params: Any) -> int:
        text = bytes(prompt).decode()
        if len(text) > self._max_chars:
            raise RequestError(f"prompt 1 has {len(text)} tokens, the context holds {self._max_chars}; shorten it")
        self.asked.append((text, params))
        answer = self._answer(text, params)
        number = len(self.asked)
        self._running[number] = [text, answer, params, len(answer) // 8 + 1]
        self.most_in_flight = max(self.most_in_flight, len(self._running))
        return number

    def abort(self, number: int) -> None:
        del self._running[number]

    def step(self) -> list[Delta]:
        deltas = []
        for number, state in list(self._running.items()):
            state[3] -= 1
            completion = self._completion(*state[:3]) if state[3] == 0 else None
            deltas.append(Delta(number, 0, "", (7,), completion))
            if completion is not None:
                del self._running[number]
                self._finished += 1
                if self._finished == self._interrupt_after:
                    os.kill(os.getpid(), signal.SIGINT)
        return deltas

    def _completion(self, prompt: str, answer: str, params: Any) -> Completion:
        num_tokens = len(answer) // 8 + 1
        done = Completion(0, answer, [7] * num_tokens, num_prompt_tokens=len(prompt), ttft_s=0.1, duration_s=0.5)
        done.finish_reason = "stop" if num_tokens < params.max_new_tokens else "length"
        if self._fail in prompt:
            done.finish_reason, done.error = "error", "no memory for a KV cache"
        return done
