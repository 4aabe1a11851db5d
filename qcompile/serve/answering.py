"""From a checked request to its response."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request, Response
from starlette.requests import ClientDisconnect

from qcompile.runtime import SamplingParams
from qcompile.runtime.errors import RequestError, TokenizerError
from qcompile.runtime.prompt import check_sampling
from qcompile.serve.api_error import ApiError, json_response
from qcompile.serve.event_stream import EventStream, events
from qcompile.serve.generation import Generation, Service
from qcompile.serve.replies import ChatReply, Reply, TextReply
from qcompile.serve.request_body import read_request
from qcompile.serve.requests import ChatRequest, GenerationRequest, TextRequest

if TYPE_CHECKING:
    from qcompile.runtime import Engine

T = TypeVar("T")
_STREAM_GRACE_S = 30.0  # for the last events of an answer that took its whole deadline
_MAX_JOINED = 4
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


async def answer_chat(service: Service, request: Request) -> Response:
    """Answer POST /v1/chat/completions."""
    parsed = await read_request(request, ChatRequest, service.settings)
    generation = Generation(service, parsed.num_choices)
    encode = partial(_encode_chat, service, parsed)
    return await _answer(service, request, parsed, generation, encode, partial(ChatReply, service, parsed))


async def answer_text(service: Service, request: Request) -> Response:
    """Answer POST /v1/completions."""
    parsed = await read_request(request, TextRequest, service.settings)
    generation = Generation(service, parsed.num_choices * len(parsed.prompt))
    encode = partial(_encode_texts, service, parsed)
    return await _answer(service, request, parsed, generation, encode, partial(TextReply, service, parsed))


async def _answer(
    service: Service,
    request: Request,
    parsed: GenerationRequest,
    generation: Generation,
    encode: Callable[[], list[list[int]]],
    make_reply: Callable[[list[list[int]]], Reply],
) -> Response:
    async def begin() -> Response:
        # a long prompt takes a second: others go on meanwhile
        prompts = await asyncio.get_running_loop().run_in_executor(service.prompt_readers, encode)
        generation.submit(prompts, _sampling(service, parsed), parsed.num_choices)
        reply = make_reply(prompts)
        return await (_stream if parsed.stream else _collect)(service, generation, reply)

    try:
        return await _unless_gone(request, begin())
    except BaseException as error:
        generation.close()
        if isinstance(error, ClientDisconnect):
            service.metrics.disconnects.inc()
        raise


async def _collect(service: Service, generation: Generation, reply: Reply) -> Response:
    del service
    async for choice, delta in generation.deltas():
        if delta.completion is not None:
            reply.take(delta.completion, choice)
    return json_response(reply.whole())


async def _stream(service: Service, generation: Generation, reply: Reply) -> Response:
    """Return the stream once its first token is there: until then a failure is still an HTTP status."""
    deltas = generation.deltas()
    first = await deltas.__anext__()

    def end() -> None:
        if generation.is_unfinished:
            service.metrics.disconnects.inc()
        generation.close()

    limit_s = service.settings.deadline_s + _STREAM_GRACE_S
    return EventStream(events(generation, reply, deltas, first), end, limit_s)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what the work returns, or stop it when the client leaves.

    Raises:
        ClientDisconnect: It left.
    """
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for unfinished in (task, watch):
            unfinished.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _sampling(service: Service, request: GenerationRequest) -> SamplingParams:
    """Return what is asked for; what is not comes from the model's generation_config.json."""
    engine = service.engine
    options = {name: getattr(request, name) for name in _SAMPLING if getattr(request, name) is not None}
    if engine.generation_config.get("do_sample") is False:
        options.setdefault("temperature", 0.0)
    _check_scores(engine, request, options)
    try:
        params = engine.sampling_params(
            **options,
            max_new_tokens=request.most_tokens or engine.max_model_len,
            seed=None if request.seed is None else request.seed % (1 << 64),
            stop=request.stop,
            ignore_eos=bool(request.ignore_eos),
            logprobs=request.num_logprobs,
        )
    except RequestError as error:
        raise ApiError(400, str(error), "invalid_value") from None
    try:
        check_sampling(params, engine.num_candidates)
    except RequestError as error:
        raise ApiError(400, str(error), "not_available", "top_k") from None
    return params


def _check_scores(engine: Engine, request: GenerationRequest, options: dict[str, Any]) -> None:
    """Refuse what needs more scores than graphs return that choose their tokens on the device."""
    choosing = [graph.io.outputs for graph in engine.manifest.graphs if graph.io.logits == "chosen"]
    if choosing and request.num_logprobs is not None:
        message = "logprobs need the scores of all tokens; this model was compiled without --keep-logits"
        raise ApiError(400, message, "not_available", "logprobs")
    if options.get("temperature") != 0 and any("top_logits" not in outputs for outputs in choosing):
        message = "this model's graphs return only the likeliest token; send temperature 0"
        raise ApiError(400, message, "not_available", "temperature")


def _encode_chat(service: Service, request: ChatRequest) -> list[list[int]]:
    engine = service.engine
    if not engine.tokenizer.has_chat_template:
        raise ApiError(400, "the model has no chat template (a base model); use /v1/completions", "no_chat_template")
    chosen = request.chat_template_kwargs
    variables = {} if chosen is None else chosen.model_dump(exclude_none=True)
    messages = [message.as_dict() for message in request.messages]
    try:
        text = engine.tokenizer.chat_template.render(messages, **variables)
    except (RequestError, TokenizerError) as error:
        message = f"the model's chat template refuses these messages: {error}"
        raise ApiError(400, message, "invalid_value", "messages") from None
    return [_encoded(service, text, "messages", add_special_tokens=False)]


def _encode_texts(service: Service, request: TextRequest) -> list[list[int]]:
    return [
        _encoded(service, prompt, "prompt") if isinstance(prompt, str) else _fitting(service, prompt, "prompt")
        for prompt in request.prompt
    ]


def _encoded(service: Service, text: str, param: str, *, add_special_tokens: bool = True) -> list[int]:
    """Return a text's ids; one that is too long for any way to cut it is refused before the work is done."""
    most = service.engine.max_model_len
    tokenizer = service.engine.tokenizer
    # normalization joins up to four characters (Unicode NFC), and a character has a byte at least
    at_least = len(text) // (_MAX_JOINED * tokenizer.longest_token)
    if at_least >= most:
        raise _too_long(param, f"more than {at_least}", most)
    try:
        ids = tokenizer.encode(text, add_special_tokens, lets_others_run=True)
    except RequestError as error:
        raise ApiError(400, str(error), "invalid_value", param) from None
    return _fitting(service, ids, param)


def _fitting(service: Service, prompt: list[int], param: str) -> list[int]:
    most = service.engine.max_model_len
    if not prompt:
        raise ApiError(400, f"{param}: the prompt is empty: it has no tokens", "invalid_value", param)
    if len(prompt) >= most:
        raise _too_long(param, str(len(prompt)), most)
    return prompt


def _too_long(param: str, seen: str, most: int) -> ApiError:
    message = f"{param}: {seen} tokens, and the context holds {most} with the answer; shorten it"
    return ApiError(400, message, "context_length_exceeded", param)
