"""Continuous batching under random traffic, over a session that notices every mistake in the bookkeeping."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.runtime import Engine, SamplingParams
from qcompile.runtime.kv_cache import KVCache, _common_prefix
from qcompile.runtime.session import UNBOUNDED, Scores

VOCAB = 512


class RecordingSession:
    """A Session whose cache is the tokens themselves; the next token is a function of all of them."""

    vocab_size = num_candidates = VOCAB
    max_chunk = 64
    max_capacity = UNBOUNDED

    def __init__(self, can_extend: bool = True) -> None:
        self.can_extend = can_extend
        self.num_slots = self.capacity = 0
        self.rows: list[list[int]] = []
        self.num_computed = 0

    def reserve(self, num_slots: int, capacity: int) -> None:
        self.num_slots, self.capacity = max(num_slots, self.num_slots), max(capacity, self.capacity)
        self.rows += [[] for _ in range(self.num_slots - len(self.rows))]

    def forward(
        self,
        first_slot: int,
        input_ids: np.ndarray,
        past: Sequence[int],
        need_scores: bool = True,
        greedy_only: bool = False,
    ) -> Scores | None:
        n, s = input_ids.shape
        assert n == 1 or s == 1, "only decode steps take several rows"
        assert s <= self.max_chunk or not self.can_extend
        assert self.can_extend or s == 1 or past[0] == 0
        self.num_computed += n * s
        values = np.zeros((n, VOCAB), np.float32)
        for row in range(n):
            cached = self.rows[first_slot + row]
            assert past[row] <= len(cached), "entries that were never written"
            assert past[row] + s <= self.capacity
            cached[past[row] :] = input_ids[row].tolist()
            values[row, follower(cached)] = 1
        return Scores(values) if need_scores else None

    def copy_slot(self, source: int, target: int, length: int) -> None:
        assert length <= len(self.rows[source])
        self.rows[target][:length] = self.rows[source][:length]

    def swap_slots(self, first: int, second: int, length: int) -> None:
        one, two = self.rows[first], self.rows[second]
        one[:length], two[:length] = two[:length], one[:length]

    def close(self) -> None:
        self.rows.clear()


def follower(tokens: Sequence[int]) -> int:
    """The token after these: depends on each of them and on the order."""
    value = 17
    for token in tokens:
        value = (value * 31 + token + 1) % 1_000_003
    return value % 400


def answer(prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(follower(tokens))
    return tokens[len(prompt) :]


def open_engine(model: Path, session: RecordingSession, **options: Any) -> Engine:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qcompile.runtime.engine.open_session", lambda *_: session)
        return Engine(model, **options)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), reuse=st.booleans(), can_extend=st.booleans())
def test_random_traffic(model: Path, data: st.DataObject, reuse: bool, can_extend: bool) -> None:
    session = RecordingSession(can_extend)
    sizes = {
        "max_batch_size": data.draw(st.integers(1, 5)),
        "prefill_chunk": data.draw(st.sampled_from([1, 3, 8, 64])),
        "reuse_prefixes": reuse,
    }
    engine = open_engine(model, session, **sizes)
    bases = [[7] * 40, list(range(50)), list(range(25)) + [9] * 30]
    wanted: dict[int, list[int]] = {}
    aborted: set[int] = set()
    done: dict[int, Any] = {}
    arrivals = data.draw(st.integers(1, 14))
    for _ in range(arrivals):
        base = data.draw(st.sampled_from(bases))
        prompt = base[: data.draw(st.integers(1, len(base)))] + data.draw(st.lists(st.integers(0, 3), max_size=3))
        count = data.draw(st.integers(1, 12))
        number = engine.add_request(prompt, SamplingParams(max_new_tokens=count, ignore_eos=True))
        wanted[number] = answer(prompt, count)
        for _ in range(data.draw(st.integers(0, 6))):
            collect(engine, done)
        if data.draw(st.integers(0, 5)) == 0:
            victim = data.draw(st.sampled_from(sorted(wanted)))
            engine.abort(victim)
            aborted.add(victim)
    while engine.has_work:
        collect(engine, done)
    assert sorted(done) == sorted(wanted)
    for number, completion in done.items():
        if completion.finish_reason == "abort":
            assert number in aborted
        assert completion.token_ids == wanted[number][: len(completion.token_ids)]
        if completion.finish_reason == "length":
            assert len(completion.token_ids) == len(wanted[number])


def collect(engine: Engine, done: dict[int, Any]) -> None:
    for delta in engine.step():
        assert delta.request_id not in done
        if delta.completion is not None:
            done[delta.request_id] = delta.completion


def test_prefixes_save_work(model: Path) -> None:
    computed = {}
    for reuse in (True, False):
        session = RecordingSession()
        engine = open_engine(model, session, reuse_prefixes=reuse)
        prompts = [[5] * 200 + [i] for i in range(20)]
        completions = engine.generate(prompts, SamplingParams(max_new_tokens=2, ignore_eos=True))
        assert [c.token_ids for c in completions] == [answer(prompt, 2) for prompt in prompts]
        computed[reuse] = session.num_computed
    assert computed[False] == 20 * 202
    assert computed[True] == 201 + 19 * 2 + 20  # two tokens of each are computed in any case


def test_prompts_come_in_their_order(model: Path) -> None:
    engine = open_engine(model, RecordingSession(), max_batch_size=2)
    numbers = [engine.add_request([i], SamplingParams(max_new_tokens=3, ignore_eos=True)) for i in range(6)]
    first_seen: list[int] = []
    while engine.has_work:
        for delta in engine.step():
            if delta.request_id not in first_seen:
                first_seen.append(delta.request_id)
    assert first_seen == numbers


def test_one_step_prefills_several_short_prompts_but_no_more_than_its_budget(model: Path) -> None:
    session = RecordingSession()
    engine = open_engine(model, session, prefill_chunk=64, reuse_prefixes=False)
    for i in range(4):
        engine.add_request([i] * 30, SamplingParams(max_new_tokens=9, ignore_eos=True))
    engine.step()
    assert session.num_computed == 2 * 30 + 2
    engine.step()
    assert session.num_computed == 2 * 30 + 2 + 2 * 30 + 4


def test_conversations_that_ran_together_both_stay_cached(model: Path) -> None:
    engine = open_engine(model, RecordingSession(), max_batch_size=4)
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    prompts = [list(range(100, 150)), list(range(200, 250))]
    engine.generate(prompts, params)
    for prompt in reversed(prompts):
        follow_up = [*prompt, *answer(prompt, 4), 3]
        completion = engine.generate([follow_up], params)[0]
        assert completion.num_reused_tokens == 53
        assert completion.token_ids == answer(follow_up, 4)


@given(st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(0, 2), max_size=40))
def test_common_prefix(first: list[int], second: list[int]) -> None:
    expected = 0
    while expected < min(len(first), len(second)) and first[expected] == second[expected]:
        expected += 1
    assert _common_prefix(first, second) == expected


def test_capacity_doubles_up_to_its_limit(caplog: pytest.LogCaptureFixture) -> None:
    session = RecordingSession()
    cache = KVCache(session, 8, 10_000)
    seen = []
    with caplog.at_level("INFO", "qcompile.runtime.kv_cache"):
        for slots, length in ((1, 10), (2, 1024), (3, 1025), (5, 5000), (5, 9000), (8, 10_000)):
            cache.reserve(slots, length)
            seen.append((session.num_slots, session.capacity))
    assert seen == [(1, 1024), (2, 1024), (4, 2048), (8, 8192), (8, 10_000), (8, 10_000)]
    assert [record.getMessage() for record in caplog.records] == [
        "KV cache grows to 8192 tokens per slot (up to 10000)",
        "KV cache grows to 10000 tokens per slot (up to 10000)",
    ]
