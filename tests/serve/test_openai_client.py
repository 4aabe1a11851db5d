"""The real `openai` client against the server."""

from typing import Any

import pytest

from qcompile.runtime import Engine, SamplingParams
from tests.serve.conftest import NAME, Running

HELLO = [{"role": "user", "content": "Hello there"}]


def chat(server: Running, **options: Any) -> Any:
    return server.openai.chat.completions.create(
        **{"model": NAME, "messages": HELLO, "temperature": 0, "max_tokens": 12, **options}
    )


def text(server: Running, **options: Any) -> Any:
    return server.openai.completions.create(**{"model": NAME, "prompt": "The quick", "temperature": 0, **options})


def expected_chat(alone: Engine, count: int = 12, messages: Any = HELLO) -> Any:
    return alone.chat(messages, SamplingParams(max_new_tokens=count))[0]


def test_a_chat_answer_is_the_engines(server: Running, alone: Engine) -> None:
    answer = chat(server)
    want = expected_chat(alone)
    assert answer.object == "chat.completion"
    assert answer.model == NAME
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", want.text)
    assert choice.finish_reason == want.finish_reason
    assert answer.usage.prompt_tokens == want.num_prompt_tokens
    assert answer.usage.completion_tokens == len(want.token_ids)
    assert answer.usage.total_tokens == want.num_prompt_tokens + len(want.token_ids)


def test_a_streamed_chat_joins_to_the_whole(server: Running, alone: Engine) -> None:
    chunks = list(chat(server, stream=True, stream_options={"include_usage": True}))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    want = expected_chat(alone)
    assert "".join(pieces) == want.text
    assert len([piece for piece in pieces if piece]) > 3
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(want.token_ids)
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_without_include_usage_no_chunk_has_it(server: Running) -> None:
    assert all(chunk.usage is None and chunk.choices for chunk in chat(server, stream=True))


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_limit(server: Running, name: str) -> None:
    answer = chat(server, **{"max_tokens": None, name: 3})
    assert answer.usage.completion_tokens == 3
    assert answer.choices[0].finish_reason == "length"


def test_text_completions_of_several_prompts(server: Running, alone: Engine) -> None:
    prompts = ["The quick", "def add(a, b):"]
    answer = text(server, prompt=prompts, max_tokens=6)
    want = alone.generate(prompts, SamplingParams(max_new_tokens=6))
    assert answer.object == "text_completion"
    assert [choice.text for choice in answer.choices] == [one.text for one in want]
    assert [choice.index for choice in answer.choices] == [0, 1]
    ids = [alone.tokenizer.encode(prompt) for prompt in prompts]
    again = text(server, prompt=ids, max_tokens=6)
    assert [choice.text for choice in again.choices] == [one.text for one in want]
    assert again.usage.prompt_tokens == sum(map(len, ids))


def test_text_default_is_sixteen_tokens(server: Running) -> None:
    assert text(server, extra_body={"ignore_eos": True}).usage.completion_tokens == 16


def test_a_streamed_text(server: Running, alone: Engine) -> None:
    chunks = list(text(server, stream=True, max_tokens=8))
    want = alone.generate("The quick", SamplingParams(max_new_tokens=8))[0]
    assert "".join(chunk.choices[0].text for chunk in chunks) == want.text
    assert chunks[-1].choices[0].finish_reason == want.finish_reason


def test_choices_differ_and_a_seed_repeats_them(server: Running, alone: Engine) -> None:
    options = {"n": 3, "seed": 7, "temperature": 1.5, "max_tokens": 10}
    first, second = (chat(server, **options) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices]
    assert len(set(texts)) == 3
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    params = alone.sampling_params(seed=7, temperature=1.5, max_new_tokens=10)
    assert texts[0] == alone.chat(HELLO, params)[0].text
    assert first.usage.prompt_tokens == len(alone.encode_chat(HELLO))


def test_streamed_choices_are_kept_apart(server: Running) -> None:
    options = {"n": 3, "seed": -7, "temperature": 1.5, "max_tokens": 10}
    whole = [choice.message.content for choice in chat(server, **options).choices]
    pieces = ["", "", ""]
    for chunk in chat(server, stream=True, **options):
        pieces[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert pieces == whole


def test_stop_strings(server: Running, alone: Engine) -> None:
    whole = expected_chat(alone, 24).text
    stop = whole[6:9]
    for given in (stop, ["never in the text", stop]):
        choice = chat(server, max_tokens=24, stop=given).choices[0]
        assert choice.message.content == whole[: whole.index(stop)]
        assert choice.finish_reason == "stop"


def test_chat_logprobs(server: Running, alone: Engine) -> None:
    choice = chat(server, logprobs=True, top_logprobs=3).choices[0]
    want = alone.chat(HELLO, SamplingParams(max_new_tokens=12, logprobs=3))[0]
    assert want.logprobs is not None
    content = choice.logprobs.content
    assert [one.logprob for one in content] == pytest.approx([one.logprob for one in want.logprobs], abs=1e-5)
    joined = b"".join(bytes(one.bytes) for one in content)
    assert joined.decode("utf-8", errors="replace") == choice.message.content
    for one in content:
        assert len(one.top_logprobs) == 3
        assert one.top_logprobs[0].logprob == one.logprob  # greedy: the chosen one is the likeliest
    streamed = [
        one
        for chunk in chat(server, logprobs=True, top_logprobs=3, stream=True)
        if chunk.choices and chunk.choices[0].logprobs
        for one in chunk.choices[0].logprobs.content
    ]
    assert [one.token for one in streamed] == [one.token for one in content]


def test_text_logprobs(server: Running) -> None:
    choice = text(server, logprobs=2, max_tokens=6).choices[0]
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 6
    assert logprobs.text_offset[0] == 0
    assert all(
        top[token] == lp
        for top, token, lp in zip(logprobs.top_logprobs, logprobs.tokens, logprobs.token_logprobs, strict=True)
    )
    assert text(server, max_tokens=2).choices[0].logprobs is None


def test_parts_and_developer_messages(server: Running, alone: Engine) -> None:
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    same = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello\nthere"}]
    assert chat(server, messages=messages).choices[0].message.content == expected_chat(alone, messages=same).text


def test_models(server: Running) -> None:
    (listed,) = server.openai.models.list().data
    assert listed.id == NAME
    assert server.openai.models.retrieve(NAME).id == NAME


def test_a_shared_beginning_is_computed_once(server: Running) -> None:
    messages = [{"role": "system", "content": "You are a helpful assistant. " * 8}, {"role": "user", "content": "One"}]
    chat(server, messages=messages)
    messages[1]["content"] = "Two"
    usage = chat(server, messages=messages).usage
    assert usage.prompt_tokens_details.cached_tokens > usage.prompt_tokens // 2
