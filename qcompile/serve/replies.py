"""Completions and deltas as OpenAI's objects: whole, or in chunks."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from qcompile.runtime import Completion, Delta
from qcompile.serve.generation import Service
from qcompile.serve.reasoning import OPEN, ReasoningSplitter
from qcompile.serve.requests import ChatRequest, GenerationRequest, TextRequest
from qcompile.serve.token_texts import TextLogprobs, chat_logprobs, told


class Reply(ABC):
    """The answer to one request.

    Args:
        service: The server.
        request: What was asked.
        prompts: Its prompts, as token ids; choice c belongs to prompt c // request.num_choices.
    """

    kind = ""
    chunk_kind = ""
    id_prefix = ""

    def __init__(self, service: Service, request: GenerationRequest, prompts: list[list[int]]) -> None:
        self.tokenizer = service.engine.tokenizer
        self.style = service.settings.reasoning
        self.prompts = prompts
        self.num_choices = len(prompts) * request.num_choices
        self._num_per_prompt = request.num_choices
        self._wants_usage = request.includes_usage
        self._completions: dict[int, Completion] = {}
        self._head = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.settings.model_name,
        }

    @abstractmethod
    def opening(self) -> Iterator[dict[str, Any]]:
        """Yield the chunks before the first token."""

    @abstractmethod
    def parts(self, choice: int, delta: Delta) -> dict[str, Any] | None:
        """Return the choice of a chunk, without its finish reason; None when nothing can be shown yet."""

    @abstractmethod
    def whole_choice(self, completion: Completion) -> dict[str, Any]:
        """Return a finished choice, without index and finish reason."""

    def take(self, completion: Completion, choice: int) -> None:
        """Note a finished generation."""
        self._completions[choice] = completion

    def chunks(self, choice: int, delta: Delta) -> Iterator[dict[str, Any]]:
        """Yield the chunks of a delta."""
        parts = self.parts(choice, delta)
        reason = None
        if delta.completion is not None:
            self.take(delta.completion, choice)
            reason = delta.completion.finish_reason
            parts = parts or self.parts_without_text()
        if parts is not None:
            yield self.chunk([{"index": choice, **parts, "finish_reason": reason}])

    @abstractmethod
    def parts_without_text(self) -> dict[str, Any]:
        """Return the choice of a chunk that only says how the text ended."""

    def closing(self) -> Iterator[dict[str, Any]]:
        """Yield the chunks behind the last token."""
        if self._wants_usage:
            yield self.chunk([]) | {"usage": self.usage()}

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Return one chunk."""
        record = {**self._head, "object": self.chunk_kind, "choices": choices}
        return {**record, "usage": None} if self._wants_usage else record

    def whole(self) -> dict[str, Any]:
        """Return the answer at once."""
        choices = [
            {"index": i, **self.whole_choice(completion), "finish_reason": completion.finish_reason}
            for i, completion in sorted(self._completions.items())
        ]
        return {**self._head, "object": self.kind, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Return the token counts; a prompt counts once, however many choices it has."""
        firsts = [self._completions[i] for i in range(0, self.num_choices, self._num_per_prompt)]
        prompt = sum(completion.num_prompt_tokens for completion in firsts)
        new = sum(len(completion.token_ids) for completion in self._completions.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": sum(c.num_reused_tokens for c in firsts)},
        }


class ChatReply(Reply):
    """The answer to /v1/chat/completions."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def __init__(self, service: Service, request: ChatRequest, prompts: list[list[int]]) -> None:
        super().__init__(service, request, prompts)
        tail = self.tokenizer.decode(prompts[0][-8:], skip_special_tokens=False)
        self._opens_thinking = tail.rstrip().endswith(OPEN)
        self._splitters = [self._splitter() for _ in range(self.num_choices)]
        self._has_logprobs = bool(request.logprobs)

    def opening(self) -> Iterator[dict[str, Any]]:
        """Yield who speaks."""
        for i in range(self.num_choices):
            delta = {"role": "assistant", "content": ""}
            yield self.chunk([{"index": i, "delta": delta, "finish_reason": None}])

    def parts(self, choice: int, delta: Delta) -> dict[str, Any] | None:
        """Return the new content, thinking and log probabilities."""
        splitter = self._splitters[choice]
        reasoning, content = splitter.push(delta.text)
        if delta.completion is not None:
            tail = splitter.flush()
            reasoning, content = reasoning + tail[0], content + tail[1]
        logprobs = told(delta.logprobs, delta.completion)
        shown: dict[str, Any] = {}
        if reasoning:
            shown["reasoning_content"] = reasoning
        if content:
            shown["content"] = content
        if not shown and not logprobs:
            return None
        parts: dict[str, Any] = {"delta": shown}
        if self._has_logprobs:
            parts["logprobs"] = chat_logprobs(self.tokenizer, logprobs)
        return parts

    def parts_without_text(self) -> dict[str, Any]:
        """Return an empty delta."""
        return {"delta": {}}

    def whole_choice(self, completion: Completion) -> dict[str, Any]:
        """Return the message."""
        splitter = self._splitter()
        pieces = (splitter.push(completion.text), splitter.flush())
        reasoning, content = ("".join(piece[side] for piece in pieces) for side in (0, 1))
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self.style != "none":
            message["reasoning_content"] = reasoning or None
        logprobs = None
        if completion.logprobs is not None:
            logprobs = chat_logprobs(self.tokenizer, told(tuple(completion.logprobs), completion))
        return {"message": message, "logprobs": logprobs}

    def _splitter(self) -> ReasoningSplitter:
        return ReasoningSplitter(self.style, self._opens_thinking)


class TextReply(Reply):
    """The answer to /v1/completions."""

    kind = "text_completion"
    chunk_kind = "text_completion"
    id_prefix = "cmpl"

    def __init__(self, service: Service, request: TextRequest, prompts: list[list[int]]) -> None:
        super().__init__(service, request, prompts)
        self._logprobs = [TextLogprobs(self.tokenizer) for _ in range(self.num_choices)]

    def opening(self) -> Iterator[dict[str, Any]]:
        """Yield nothing: a text has no speaker."""
        return iter(())

    def parts(self, choice: int, delta: Delta) -> dict[str, Any] | None:
        """Return the new text and its log probabilities."""
        logprobs = told(delta.logprobs, delta.completion)
        if not delta.text and not logprobs:
            return None
        return {"text": delta.text, "logprobs": self._logprobs[choice].take(logprobs) if logprobs else None}

    def parts_without_text(self) -> dict[str, Any]:
        """Return an empty text."""
        return {"text": "", "logprobs": None}

    def whole_choice(self, completion: Completion) -> dict[str, Any]:
        """Return the text."""
        logprobs = None
        if completion.logprobs is not None:
            logprobs = TextLogprobs(self.tokenizer).take(told(tuple(completion.logprobs), completion))
        return {"text": completion.text, "logprobs": logprobs}
