"""The arithmetic of a benchmark on a clock that does not run by itself, and an engine that takes known times."""

from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.benchmark.cases import BATCHES, CONTEXTS, Case, cases_of, prompts_of
from qcompile.benchmark.child import CaseError, answer, measure, peak_rss_bytes
from qcompile.benchmark.floor import best_rate, matrix_rates, memory_rates
from qcompile.benchmark.machine import busy_warning, describe_machine
from qcompile.benchmark.report import Spread, load_row, noise_warnings, rows_of
from qcompile.benchmark.traffic import Floor, Traffic, traffic_of
from qcompile.runtime import Engine
from qcompile.runtime.manifest import Manifest
from tests.optimized import export_tiny, optimize_tiny


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class FakeEngine:
    """A prompt costs `prefill` seconds per token in chunks of 64; a decode step costs `decode` seconds for all rows."""

    def __init__(self, clock, prefill=0.01, decode=0.5, fail_at=None):
        self.clock, self.prefill, self.decode, self.fail_at = clock, prefill, decode, fail_at
        self.waiting, self.running, self.aborted, self.steps = deque(), [], [], 0

    @property
    def has_work(self):
        return bool(self.waiting or self.running)

    def add_request(self, prompt, params):
        number = len(self.waiting) + len(self.running)
        self.waiting.append([number, len(prompt), params.max_new_tokens])
        return number

    def abort(self, request):
        self.aborted.append(request)
        self.running = [r for r in self.running if r != request]

    def step(self):
        self.steps += 1
        deltas = [SimpleNamespace(request_id=r, token_ids=(1,), completion=None) for r in self.running]
        if self.running:
            self.clock.now += self.decode
        if self.waiting:
            chunk = min(64, self.waiting[0][1])
            self.clock.now += chunk * self.prefill
            self.waiting[0][1] -= chunk
            if not self.waiting[0][1]:
                number = self.waiting.popleft()[0]
                self.running.append(number)
                deltas.append(SimpleNamespace(request_id=number, token_ids=(1,), completion=None))
        if self.fail_at is not None and self.steps >= self.fail_at:
            done = SimpleNamespace(finish_reason="error", error="boom")
            deltas.append(SimpleNamespace(request_id=0, token_ids=(), completion=done))
        return deltas


def test_one_request():
    clock = Clock()
    engine = FakeEngine(clock)
    seen = measure(engine, [[7] * 128], steps=10, room=100, clock=clock)
    assert seen["ttft_s"] == pytest.approx(1.28)
    assert seen["prefill_s"] == pytest.approx(1.28)
    assert seen["decode_s"] == pytest.approx(5.0)
    assert seen["decode_tokens"] == 10
    assert seen["mean_context"] == 128 + (1 + 11) / 2
    assert engine.aborted == [0]
    assert not engine.has_work


def test_only_steps_with_every_row_running_are_timed():
    clock = Clock()
    seen = measure(FakeEngine(clock), [[7] * 128] * 4, steps=6, room=100, clock=clock)
    assert seen["ttft_s"] == pytest.approx(1.28)
    assert seen["prefill_s"] > 4 * 1.28
    assert seen["decode_s"] == pytest.approx(6 * 0.5)
    assert seen["decode_tokens"] == 24


def test_a_request_that_ends_is_no_measurement():
    clock = Clock()
    with pytest.raises(CaseError, match="a request ended with 'error' before it was timed: boom"):
        measure(FakeEngine(clock, fail_at=4), [[7] * 128], steps=10, room=100, clock=clock)


def test_the_real_engine_is_measured(tmp_path):
    source = export_tiny(tmp_path)
    optimize_tiny(source, tmp_path / "ort")
    case = Case(3, 70, 5)
    with Engine(tmp_path / "ort", max_batch_size=3, max_model_len=case.room, reuse_prefixes=False) as engine:
        ticks = iter(range(10_000))
        seen = measure(engine, prompts_of(range(50), case), case.steps, case.room - case.context, lambda: next(ticks))
    assert seen["decode_tokens"] == 15
    assert seen["decode_s"] == 1
    assert not engine._scheduler.has_work


def test_a_failed_job_answers_in_one_line(tmp_path):
    import json

    job = {"directory": str(tmp_path), "prompts": [[1]], "room": 4, "threads": 1, "max_model_len": 9, "steps": 1}
    error = answer(json.dumps(job))["error"]
    assert "no qcompile.json" in error
    assert "\n" not in error


def test_cases():
    assert [(c.batch, c.context) for c in cases_of(quick=False)] == [(b, c) for b in BATCHES for c in CONTEXTS]
    assert [(c.batch, c.context) for c in cases_of(quick=True)] == [(1, 128), (1, 1024), (8, 128)]


@given(st.integers(1, 8), st.integers(1, 200), st.integers(1, 3000))
def test_prompts_have_the_length_asked_for(batch, context, length):
    prompts = prompts_of(list(range(length)), Case(batch, context, 4))
    assert [len(p) for p in prompts] == [context] * batch
    assert all(0 <= i < length for p in prompts for i in p)


def test_spread():
    spread = Spread.of([4.0, 1.0, 2.0, 3.0, 10.0])
    assert (spread.median, spread.low, spread.high, spread.count) == (3.0, 2.0, 4.0, 5)
    assert spread.noise == pytest.approx(2 / 3)


TRAFFIC = Traffic(
    weight_bytes=1000,
    kv_bytes_per_token=2,
    float_weights=100,
    integer_weights=400,
    head_weights=300,
    head_is_integer=True,
    scores_all=False,
)
FLOOR = Floor(bytes_per_s=500.0, float_ops_per_s=1e3, integer_ops_per_s=4e3)


def test_floors_by_hand():
    assert TRAFFIC.decode_seconds(1, 250, FLOOR) == pytest.approx((1000 + 500) / 500)
    compute = 200 / 1e3 + 800 / 4e3 + 600 / 4e3
    assert TRAFFIC.decode_seconds(100, 0, FLOOR) == pytest.approx(100 * compute)
    assert TRAFFIC.prefill_seconds(10, FLOOR) == pytest.approx(10 * (200 / 1e3 + 800 / 4e3) + 600 / 4e3)
    assert TRAFFIC.prefill_seconds(1, FLOOR) == pytest.approx(1000 / 500)


def sample(ttft, decode_s, tokens=10, rss=1000):
    return {
        "ttft_s": ttft, "decode_s": decode_s, "decode_tokens": tokens, "mean_context": 250.0,
        "peak_rss_bytes": rss, "load_s": 2.0,
    }  # fmt: skip


def test_rows_are_medians_with_their_share_of_the_floor():
    one, many = Case(1, 100, 10), Case(4, 100, 10)
    samples = {
        one: [sample(50, 40), sample(40, 50), sample(100, 20)],
        many: [sample(1, 10, tokens=40), {"error": "no memory"}, sample(1, 20, tokens=40)],
    }
    rows = {(r.metric, r.batch): r for r in rows_of(samples, TRAFFIC, FLOOR)}
    assert rows["prefill", 1].value.median == pytest.approx(2.0)
    assert rows["ttft", 1].value.median == 50
    assert rows["decode", 1].value.median == pytest.approx(0.25)
    assert rows["decode", 4].value.median == pytest.approx((4 + 2) / 2)
    assert rows["decode", 4].value.count == 2
    assert rows["decode", 1].floor == pytest.approx(1 / 3)
    assert rows["decode", 1].fraction == pytest.approx(0.75)
    assert rows["ttft", 1].fraction == pytest.approx(TRAFFIC.prefill_seconds(100, FLOOR) / 50)
    assert ("prefill", 4) not in rows
    assert load_row(samples).value.count == 5


def test_a_case_that_never_ran_keeps_its_row_and_reason():
    case = Case(1, 100, 10)
    rows = rows_of({case: [{"error": "no memory"}]}, TRAFFIC, FLOOR)
    assert {r.metric for r in rows} == {"prefill", "decode", "ttft", "peak rss"}
    assert all(r.value is None and r.reason == "no memory" and r.fraction is None for r in rows)


def test_noise_is_named():
    steady, wild = Case(1, 100, 10), Case(1, 200, 10)
    samples = {steady: [sample(50, 40)] * 3, wild: [sample(50, 40), sample(50, 20), sample(50, 80)]}
    warnings = noise_warnings(rows_of(samples, TRAFFIC, FLOOR))
    assert len(warnings) == 1
    assert "decode batch 1 context 200" in warnings[0]
    assert "context 100" not in warnings[0]


@pytest.mark.parametrize(
    ("load", "cores", "warns"), [(None, 2, False), (0.4, 2, False), (0.6, 2, True), (3.0, 64, False)]
)
def test_a_busy_machine_is_named(load, cores, warns):
    assert (busy_warning(load, cores) is not None) == warns


def test_the_best_of_several_runs_counts():
    clock, costs = Clock(), iter([9.0, 4.0, 2.0, 8.0, 8.0])

    def work():
        clock.now += next(costs)

    assert best_rate(work, 16.0, seconds=13.0, clock=clock) == pytest.approx(8.0)


def test_rates_are_measured(monkeypatch):
    monkeypatch.setattr("qcompile.benchmark.floor._BUFFER_BYTES", 1 << 20)
    seen = {**memory_rates(1, 0.0), **matrix_rates(1, 0.0)}
    assert set(seen) == {"read_bytes_per_s", "copy_bytes_per_s", "fp32_ops_per_s", "int8_ops_per_s"}
    assert all(np.isfinite(v) and v > 0 for v in seen.values())


def test_peak_memory_is_read_from_the_kernel(tmp_path):
    status = tmp_path / "status"
    status.write_text("Name:\tx\nVmPeak:\t 9 kB\nVmHWM:\t   2048 kB\n", encoding="ascii")
    assert peak_rss_bytes(status) == 2 << 20
    assert peak_rss_bytes(tmp_path / "absent") > 1 << 20


def test_machine():
    machine = describe_machine(3)
    assert machine["threads"] == 3
    assert machine["onnxruntime"]


@pytest.mark.parametrize("tied", [True, False])
def test_traffic_counts_what_a_token_needs(tmp_path, tied):
    """Against the config's own arithmetic: 2 layers of q, k, v, o, gate, up, down, and the head."""
    source = export_tiny(tmp_path, tie_word_embeddings=tied)
    manifest = Manifest.load(source)
    hidden, ffn, kv, vocab = 64, 160, 2 * 16, 512
    layers = 2 * (hidden * (hidden + 2 * kv) + hidden * hidden + 3 * hidden * ffn)
    optimize_tiny(source, tmp_path / "fused")
    for path in (source, tmp_path / "fused"):
        traffic = traffic_of(path / "model.onnx", manifest.model)
        assert (traffic.float_weights, traffic.integer_weights) == (layers, 0)
        assert (traffic.head_weights, traffic.head_is_integer) == (hidden * vocab, False)
        assert traffic.kv_bytes_per_token == 2 * 2 * kv * 4
        assert 0 <= traffic.weight_bytes - 4 * (layers + hidden * vocab) < 80_000
    assert traffic.scores_all is False
    optimize_tiny(source, tmp_path / "int8", "fuse", "int8-weight")
    traffic = traffic_of(tmp_path / "int8" / "model.onnx", manifest.model)
    assert traffic.float_weights + traffic.integer_weights == layers
    assert traffic.head_weights == hidden * vocab
    assert traffic.weight_bytes < 2.2 * (layers + hidden * vocab) + 80_000
