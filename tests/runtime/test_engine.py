"""The engine: batches, streams, prefixes, limits, failures."""

import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompile.runtime import Engine, SamplingParams
from qcompile.runtime.errors import ManifestError, RequestError, SessionError, TokenizerError
from qcompile.runtime.kv_cache import MIN_CHUNK
from tests.runtime.prompts import LONG, PROMPTS, ids_of
from tests.runtime.test_ort_graph import edit_manifest
from tests.runtime.test_tokenizer import rewrite

STYLES = [("shared", "last"), ("concat", "all"), ("concat", "last")]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_a_batch_gives_what_each_prompt_gives_alone(
    compiled: Callable[..., Path], style: tuple[str, str], dtype: str, model_type: str
) -> None:
    directory = compiled(model_type, kv_cache=style[0], logits=style[1], dtype=dtype)
    with Engine(directory, threads=1, max_batch_size=1, reuse_prefixes=False) as alone:
        expected = [alone.generate([prompt], LONG)[0].token_ids for prompt in PROMPTS]
    with Engine(directory, threads=1) as together:
        assert ids_of(together.generate(PROMPTS, LONG)) == expected


@pytest.mark.parametrize("kv_cache", ["shared", "concat"])
@pytest.mark.parametrize(
    "options",
    [
        {"max_batch_size": 2},
        {"max_batch_size": 3, "prefill_chunk": 5},
        {"max_batch_size": 3, "prefill_chunk": 1, "reuse_prefixes": False},
        {"prefill_chunk": 16, "max_model_len": 400},
    ],
)
def test_slots_and_chunks_do_not_change_the_text(
    compiled: Callable[..., Path], expected: list[list[int]], kv_cache: str, options: dict[str, Any]
) -> None:
    with Engine(compiled(kv_cache=kv_cache), threads=1, **options) as engine:
        assert ids_of(engine.generate(PROMPTS * 2, LONG)) == expected * 2


def test_a_stream_is_the_completion_in_pieces(engine: Engine) -> None:
    texts: dict[int, str] = {}
    tokens: dict[int, list[int]] = {}
    completions = {}
    for delta in engine.stream(PROMPTS, LONG):
        texts[delta.index] = texts.get(delta.index, "") + delta.text
        tokens.setdefault(delta.index, []).extend(delta.token_ids)
        assert delta.index not in completions
        if delta.completion is not None:
            completions[delta.index] = delta.completion
    for index, completion in completions.items():
        assert completion.text == texts[index]
        assert completion.token_ids == tokens[index]
        assert completion.text == engine.tokenizer.decode(completion.token_ids)
        assert completion.num_prompt_tokens == len(engine.tokenizer.encode(PROMPTS[index]))
        assert 0 < completion.ttft_s <= completion.duration_s
        assert completion.tokens_per_s > 0
    assert sorted(completions) == list(range(len(PROMPTS)))


def test_prompts_as_ids_and_as_text(engine: Engine) -> None:
    ids = engine.tokenizer.encode(PROMPTS[0])
    by_text = engine.generate(PROMPTS[0], LONG)
    for given in (ids, [ids], [np.array(ids)], (tuple(ids),)):
        assert ids_of(engine.generate(given, LONG)) == ids_of(by_text)


def test_params_one_per_prompt(engine: Engine) -> None:
    many = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in (1, 2, 3)]
    completions = engine.generate(PROMPTS[:3], many)
    assert [len(ids) for ids in ids_of(completions)] == [1, 2, 3]
    assert [completion.finish_reason for completion in completions] == ["length"] * 3
    with pytest.raises(RequestError, match="2 sampling params for 3 prompts"):
        engine.generate(PROMPTS[:3], many[:2])
    with pytest.raises(RequestError, match="SamplingParams are wanted, got dict"):
        engine.generate("x", [{}])  # type: ignore[list-item]


def test_sampling_does_not_depend_on_the_batch(engine: Engine) -> None:
    params = SamplingParams(max_new_tokens=16, temperature=1.0, top_p=0.95, seed=11, ignore_eos=True)
    alone = [engine.generate(prompt, params)[0].token_ids for prompt in PROMPTS]
    assert ids_of(engine.generate(PROMPTS, params)) == alone
    assert len({tuple(ids) for ids in alone}) == len(PROMPTS)
    mixed = engine.generate(PROMPTS, [params, LONG, params, LONG, params])
    assert [ids_of(mixed)[i] for i in (0, 2, 4)] == [alone[i] for i in (0, 2, 4)]


def test_end_tokens(engine: Engine, expected: list[list[int]]) -> None:
    """The ids of generation_config.json, and those of the request; the ending token is kept in token_ids."""
    assert engine.end_ids == [402, 400]
    third = expected[0][2]
    position = expected[0].index(third)
    completion = engine.generate(PROMPTS[0], SamplingParams(max_new_tokens=24, stop_token_ids=[third]))[0]
    assert completion.token_ids == expected[0][: position + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", third)
    assert completion.text == engine.tokenizer.decode(expected[0][:position])


def test_stop_strings(engine: Engine) -> None:
    whole = engine.generate(PROMPTS[0], LONG)[0]
    stop = whole.text[7:10]
    start = whole.text.find(stop)
    for include_stop in (False, True):
        params = LONG.with_options(stop=stop, include_stop=include_stop)
        completion = engine.generate(PROMPTS[0], params)[0]
        assert completion.text == whole.text[: start + (len(stop) if include_stop else 0)]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
        assert completion.token_ids == whole.token_ids[: len(completion.token_ids)]
        assert "".join(delta.text for delta in engine.stream(PROMPTS[0], params)) == completion.text


def test_held_back_text_is_shown_when_the_limit_comes(engine: Engine) -> None:
    whole = engine.generate(PROMPTS[0], LONG)[0]
    completion = engine.generate(PROMPTS[0], LONG.with_options(stop=whole.text[-2:] + "\0never"))[0]
    assert completion.text == whole.text
    assert completion.finish_reason == "length"


def test_the_context_ends_a_text(model: Path) -> None:
    with Engine(model, threads=1, max_model_len=20) as engine:
        completion = engine.generate([[5] * 12], SamplingParams(ignore_eos=True))[0]
        assert (len(completion.token_ids), completion.finish_reason) == (8, "length")
        with pytest.raises(RequestError, match="prompt 2 has 20 tokens, the context holds 20 with the answer"):
            engine.generate([[5], [5] * 20])
    with pytest.raises(RequestError, match="max_model_len 4096 is beyond the model's 2048 positions"):
        Engine(model, max_model_len=4096)


def test_the_cache_grows_while_a_text_does(compiled: Callable[..., Path]) -> None:
    directory = compiled(max_position_embeddings=2048)
    with Engine(directory, threads=1, max_batch_size=2) as engine:
        assert engine.max_model_len == 2048
        prompt = list(np.random.default_rng(0).integers(0, 400, 1100))
        grown = engine.generate([prompt[:1015], prompt], SamplingParams(max_new_tokens=30, ignore_eos=True))
    with Engine(directory, threads=1, max_batch_size=1, prefill_chunk=2000) as engine:
        alone = [engine.generate([p], LONG.with_options(max_new_tokens=30))[0] for p in (prompt[:1015], prompt)]
    assert ids_of(grown) == ids_of(alone)
    assert [len(ids) for ids in ids_of(grown)] == [30, 30]


@pytest.mark.parametrize("kv_cache", ["shared", "concat"])
def test_a_conversation_computes_only_what_is_new(compiled: Callable[..., Path], kv_cache: str) -> None:
    directory = compiled(kv_cache=kv_cache)
    turns = [{"role": "user", "content": "Hello, how are you today?"}]
    with Engine(directory, threads=1) as engine, Engine(directory, threads=1, reuse_prefixes=False) as fresh:
        first = engine.chat(turns, LONG)[0]
        assert first.num_reused_tokens == 0
        turns += [{"role": "assistant", "content": "Fine."}, {"role": "user", "content": "And now?"}]
        second = engine.chat(turns, LONG)[0]
        assert second.num_reused_tokens >= len(engine.encode_chat(turns[:1])) - 1
        assert second.token_ids == fresh.chat(turns, LONG)[0].token_ids
        assert fresh.chat(turns, LONG)[0].num_reused_tokens == 0
        again = engine.chat(turns, LONG)[0]
        assert again.num_reused_tokens == again.num_prompt_tokens - MIN_CHUNK
        assert again.token_ids == second.token_ids


def test_a_shared_beginning_is_computed_once(model: Path) -> None:
    common = list(range(1, 60))
    prompts = [[*common, 100 + i] for i in range(4)]
    with Engine(model, threads=1) as engine, Engine(model, threads=1, reuse_prefixes=False) as fresh:
        completions = engine.generate(prompts, LONG)
        assert [c.num_reused_tokens for c in completions] == [0, 58, 58, 58]
        assert ids_of(completions) == ids_of(fresh.generate(prompts, LONG))


def test_several_conversations(engine: Engine) -> None:
    conversations = [[{"role": "user", "content": text}] for text in ("a", "b")]
    completions = engine.chat(conversations, LONG)
    assert ids_of(completions) == [engine.chat(c, LONG)[0].token_ids for c in conversations]


def test_logprobs(engine: Engine, expected: list[list[int]]) -> None:
    completion = engine.generate(PROMPTS[0], LONG.with_options(logprobs=3))[0]
    assert completion.token_ids == expected[0]
    assert completion.logprobs is not None
    assert [token.token_id for token in completion.logprobs] == expected[0]
    for token in completion.logprobs:
        assert token.top[0] == (token.token_id, token.logprob)
        assert len(token.top) == 3
        assert token.logprob < 0


def test_streamed_logprobs_are_those_of_the_completion(engine: Engine) -> None:
    params = LONG.with_options(logprobs=2)
    for prompt in PROMPTS[:3]:
        deltas = list(engine.stream(prompt, params))
        last = deltas[-1].completion
        assert last is not None
        assert [one for delta in deltas for one in delta.logprobs] == last.logprobs
        assert all(len(delta.logprobs) == len(delta.token_ids) for delta in deltas)


@pytest.mark.parametrize(
    ("prompts", "match"),
    [
        ("", "prompt 1 is empty"),
        (["x", ""], "prompt 2 is empty"),
        ([], "non-empty list"),
        (7, "a text, or a non-empty list"),
        ([[]], "prompt 1 is empty"),
        ([[1, 999]], "prompt 1: token id 999; the model has 0 to 511"),
        ([[1, -1]], "token id -1"),
        ([[1, "a"]], "token id 'a'"),
        ([None], "prompt 1: a text or a list of token ids is wanted, got NoneType"),
        (["a\udc80"], "not valid UTF-8"),
        ([[3] * 2048], "prompt 1 has 2048 tokens, the context holds 2048"),
    ],
)
def test_prompts_that_cannot_be_served(engine: Engine, prompts: Any, match: str) -> None:
    with pytest.raises(RequestError, match=match):
        engine.generate(prompts, LONG)


@pytest.mark.parametrize("name", ["threads", "max_batch_size", "max_model_len", "prefill_chunk"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_arguments_out_of_range(model: Path, name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"{name}: a positive integer is wanted, got {value}"):
        Engine(model, **{name: value})


def test_more_threads_than_any_machine_has(model: Path) -> None:
    with pytest.raises(RequestError, match="threads: at most 1024 are wanted, got 1025"):
        Engine(model, threads=1025)


def test_directories_that_are_no_model(tmp_path: Path, own_model: Path) -> None:
    with pytest.raises(ManifestError, match=r"no qcompile\.json"):
        Engine(tmp_path / "nothing")
    edit_manifest(own_model, lambda record: record.update(target="toaster"))
    with pytest.raises(SessionError, match="compiled for 'toaster'; this runtime runs portable, ort and ascend chips"):
        Engine(own_model)


def test_a_base_model_has_no_chat(own_model: Path) -> None:
    rewrite(own_model, "tokenizer_config.json", None)
    with Engine(own_model, threads=1) as engine:
        with pytest.raises(TokenizerError, match="no chat template"):
            engine.chat([{"role": "user", "content": "x"}])
        assert engine.generate("x", LONG)[0].token_ids


def test_closing(model: Path) -> None:
    engine = Engine(model, threads=1)
    engine.close()
    engine.close()
    for call in (lambda: engine.generate("x"), lambda: engine.add_request("x"), engine.step):
        with pytest.raises(SessionError, match="the engine is closed"):
            call()


class TestRequests:
    """The door of a server: add_request, step, abort."""

    def test_requests_join_and_leave_between_steps(self, model: Path, expected: list[list[int]]) -> None:
        with Engine(model, threads=1, max_batch_size=3) as engine:
            waiting = list(enumerate(PROMPTS * 2))
            prompt_of, done, steps = {}, {}, 0
            while waiting or engine.has_work:
                if waiting and steps % 3 == 0:
                    index, prompt = waiting.pop(0)
                    prompt_of[engine.add_request(prompt, LONG)] = index
                for delta in engine.step():
                    if delta.completion is not None:
                        done[prompt_of[delta.request_id]] = delta.completion.token_ids
                steps += 1
            assert [done[i] for i in range(len(done))] == expected * 2
            assert engine.step() == []

    def test_abort(self, engine: Engine, expected: list[list[int]]) -> None:
        running = [engine.add_request(prompt, LONG) for prompt in PROMPTS[:3]]
        engine.step()
        waiting = engine.add_request(PROMPTS[3], LONG)
        engine.abort(running[1])
        engine.abort(waiting)
        engine.abort(10**9)
        done = {}
        while engine.has_work:
            for delta in engine.step():
                if delta.completion is not None:
                    done[delta.request_id] = delta.completion
        assert [done[i].finish_reason for i in (*running, waiting)] == ["length", "abort", "length", "abort"]
        assert done[running[0]].token_ids == expected[0]
        assert done[running[2]].token_ids == expected[2]
        assert done[running[1]].token_ids == expected[1][: len(done[running[1]].token_ids)]

    def test_a_request_that_comes_and_goes_during_a_step(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        """Another thread adds and ends it just after the step found that no more had arrived."""

        class Arrivals(deque[Any]):
            def __bool__(self) -> bool:
                any_left = len(self) > 0
                if not any_left and not crossing:
                    crossing.append(engine.add_request("y", LONG))
                    engine.abort(crossing[0])
                return any_left

        crossing: list[int] = []
        monkeypatch.setattr(engine, "_arrivals", Arrivals())
        first = engine.add_request(PROMPTS[0], LONG)
        done = {}
        while engine.has_work:
            done.update({d.request_id: d.completion for d in engine.step() if d.completion is not None})
        assert done[first].finish_reason == "length"
        assert done[crossing[0]].finish_reason == "abort"

    def test_a_prompt_does_not_stall_the_others(self, model: Path) -> None:
        """While a long prompt is prefilled in chunks, a running request gets a token every step."""
        with Engine(model, threads=1, prefill_chunk=16) as engine:
            first = engine.add_request("x", SamplingParams(max_new_tokens=100, ignore_eos=True))
            engine.step()
            second = engine.add_request([7] * 160, LONG)
            for _ in range(9):
                deltas = engine.step()
                assert [delta.request_id for delta in deltas] == [first]
            assert {delta.request_id for delta in engine.step()} == {first, second}

    def test_leaving_a_stream_aborts_it(self, engine: Engine, expected: list[list[int]]) -> None:
        stream = engine.stream(PROMPTS, LONG)
        next(stream)
        stream.close()
        assert not engine.has_work
        assert ids_of(engine.generate(PROMPTS, LONG)) == expected

    def test_streams_in_turns(self, engine: Engine, expected: list[list[int]]) -> None:
        first, second = engine.stream(PROMPTS[0], LONG), engine.stream(PROMPTS[1], LONG)
        seen: list[list[int]] = [[], []]
        for one, two in zip(first, second, strict=True):
            seen[0] += one.token_ids
            seen[1] += two.token_ids
        assert seen == expected[:2]

    def test_threads(self, engine: Engine, expected: list[list[int]]) -> None:
        results: dict[int, list[list[int]]] = {}

        def work(number: int) -> None:
            results[number] = ids_of(engine.generate(PROMPTS, LONG))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == dict.fromkeys(range(4), expected)
