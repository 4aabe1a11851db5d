"""The requests that are understood, field by field.

A field that OpenAI knows and that would change the answer is implemented, or refused unless it has the value that
changes nothing. A field that changes no answer (`user`, `metadata`, ...) is taken and ignored. Any other field is
refused by name: a misspelt option never passes in silence.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_CHOICES = 128
_DEFAULT_TEXT_TOKENS = 16  # of /v1/completions, as OpenAI has it


def _neutral(*values: Any) -> AfterValidator:
    """A field that is accepted only with values that change nothing."""

    def check(value: Any) -> Any:
        if value is None or any(type(value) is type(v) and value == v for v in values):
            return value
        raise ValueError(f"not supported by this server; leave it out{f' or send {values[0]!r}' if values else ''}")

    return AfterValidator(check)


def _stops(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return ()
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) for s in stops):
        raise ValueError(f"a text or a list of at most {MAX_STOPS} texts is wanted")
    if any(not 0 < len(s) <= MAX_STOP_CHARS for s in stops):
        raise ValueError(f"each of 1 to {MAX_STOP_CHARS} characters")
    return tuple(stops)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _prompts(value: Any) -> Any:
    if isinstance(value, str) or _is_ids(value):
        return [value]
    if isinstance(value, list) and value and all(isinstance(p, str) or _is_ids(p) for p in value):
        return value
    raise ValueError("a text, a list of token ids, or a non-empty list of either is wanted")


def _content(value: Any) -> Any:
    """A message's text: a string, or a list of {"type": "text", "text": ...} parts."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError("a text or a list of text parts is wanted")
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError('only parts {"type": "text", "text": "..."} are understood')
    return "\n".join(part["text"] for part in value)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Strict):
    """Options of a stream."""

    include_usage: bool | None = None


class TemplateOptions(_Strict):
    """What a request may tell the model's own chat template: values only, never a template."""

    enable_thinking: bool | None = None


class Message(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Any, AfterValidator(_content)] = None
    name: str | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: Annotated[Any, _neutral()] = None
    tool_calls: Annotated[Any, _neutral([])] = None

    def as_dict(self) -> dict[str, str]:
        """Return it as chat templates take it."""
        role = "system" if self.role == "developer" else self.role
        record = {"role": role, "content": self.content or ""}
        if self.reasoning_content is not None:
            record["reasoning_content"] = self.reasoning_content
        return record


class GenerationRequest(_Strict):
    """What both kinds of request have."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: Annotated[Any, AfterValidator(_stops)] = ()
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    # beyond OpenAI, named as elsewhere
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=1e-4, le=100)  # a smaller one overflows every score
    ignore_eos: bool | None = None
    # of OpenAI, not implemented
    frequency_penalty: Annotated[Any, _neutral(0, 0.0)] = None
    presence_penalty: Annotated[Any, _neutral(0, 0.0)] = None
    logit_bias: Annotated[Any, _neutral({})] = None
    user: str | None = None

    @property
    def num_choices(self) -> int:
        """How many answers per prompt are wanted."""
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def most_tokens(self) -> int | None:
        """The most new tokens; None for what the context holds."""
        raise NotImplementedError

    @property
    def num_logprobs(self) -> int | None:
        """How many likely tokens are wanted with each log probability; None for no log probabilities."""
        raise NotImplementedError


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    chat_template_kwargs: TemplateOptions | None = None
    response_format: Annotated[Any, _neutral({"type": "text"})] = None
    tools: Annotated[Any, _neutral([])] = None
    tool_choice: Annotated[Any, _neutral("none", "auto")] = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[Any, _neutral([])] = None
    modalities: Annotated[Any, _neutral(["text"])] = None
    store: Annotated[Any, _neutral(False)] = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def most_tokens(self) -> int | None:
        """The most new tokens; the newer of the two names wins."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        """How many likely tokens are wanted with each log probability."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TextRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Annotated[Any, AfterValidator(_prompts)]
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: Annotated[Any, _neutral(False)] = None
    suffix: Annotated[Any, _neutral()] = None
    best_of: Annotated[Any, _neutral(1)] = None

    @property
    def most_tokens(self) -> int | None:
        """The most new tokens; OpenAI's default is 16."""
        return self.max_tokens or _DEFAULT_TEXT_TOKENS

    @property
    def num_logprobs(self) -> int | None:
        """How many likely tokens are wanted with each log probability."""
        return self.logprobs
