"""Whatever breaks a step of the engine: the next request is served as if nothing had been."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompile.runtime import Engine, SamplingParams
from qcompile.runtime.errors import SessionError
from tests.runtime.prompts import LONG, PROMPTS, ids_of


class TestFailures:
    """Whatever breaks a step, the engine serves the next request."""

    def break_forward(self, engine: Engine, error: BaseException, calls: int) -> None:
        session: Any = engine._session
        forward = session.forward

        def failing(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls -= 1
            if calls == 0:
                session.forward = forward
                raise error
            return forward(*args, **kwargs)

        session.forward = failing

    @pytest.mark.parametrize("calls", [1, 3, 6, 12])
    def test_generate_raises_and_the_engine_goes_on(self, model: Path, expected: list[list[int]], calls: int) -> None:
        with Engine(model, threads=1) as engine:
            self.break_forward(engine, SessionError("device lost"), calls)
            with pytest.raises(SessionError, match="device lost"):
                engine.generate(PROMPTS, LONG)
            assert not engine.has_work
            assert ids_of(engine.generate(PROMPTS, LONG)) == expected

    def test_a_failing_prompt_does_not_take_the_others_along(self, model: Path, expected: list[list[int]]) -> None:
        with Engine(model, threads=1) as engine:
            self.break_forward(engine, SessionError("device lost"), 2)
            completions = engine.generate(PROMPTS, LONG, raise_errors=False)
        assert [c.finish_reason for c in completions] == ["length", "error", "length", "length", "length"]
        assert completions[1].error == "device lost"
        assert [ids_of(completions)[i] for i in (0, 2, 3, 4)] == [expected[i] for i in (0, 2, 3, 4)]

    def test_an_interrupt_leaves_an_empty_engine(self, model: Path, expected: list[list[int]]) -> None:
        with Engine(model, threads=1) as engine:
            self.break_forward(engine, KeyboardInterrupt(), 7)
            with pytest.raises(KeyboardInterrupt):
                engine.generate(PROMPTS, LONG)
            assert not engine.has_work
            assert ids_of(engine.generate(PROMPTS, LONG)) == expected

    def test_no_memory_for_a_prompt_fails_that_request(
        self, model: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with Engine(model, threads=1, max_batch_size=2) as engine:
            assert engine.generate(PROMPTS[0], LONG)
            monkeypatch.setattr("qcompile.runtime.ort_shared.available_bytes", lambda: 1000)
            with pytest.raises(SessionError, match="no memory for a KV cache of 1 slots x 2048 tokens"):
                engine.generate([[7] * 1500], LONG)
            long_answer = SamplingParams(max_new_tokens=1500, ignore_eos=True)
            cut = engine.generate([[7] * 1000], long_answer, raise_errors=False)[0]
            assert cut.finish_reason == "error"
            assert len(cut.token_ids) == 25
            assert engine.generate(PROMPTS[0], LONG)[0].token_ids == expected[0]
            monkeypatch.undo()
            assert len(engine.generate([[7] * 1500], LONG)[0].token_ids) == 24

    def test_scores_that_are_no_numbers(self, model: Path) -> None:
        with Engine(model, threads=1) as engine:
            session: Any = engine._session
            forward = session.forward

            def broken(*args: Any, **kwargs: Any) -> Any:
                scores = forward(*args, **kwargs)
                scores.values[-1, 5] = np.nan
                return scores

            session.forward = broken
            with pytest.raises(SessionError, match="the model's scores are nan"):
                engine.generate("x", LONG)


def test_old_onnxruntime_gets_whole_prompts(
    model: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before 1.20 GroupQueryAttention ignores the past of a chunk: nothing may be split or reused then."""
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.19.2")
    with Engine(model, threads=1, prefill_chunk=4) as engine:
        session: Any = engine._session
        forward, shapes = session.forward, []

        def recording(slot: int, ids: np.ndarray, past: list[int], *rest: Any, **more: Any) -> Any:
            shapes.append((ids.shape[1], max(past)))
            return forward(slot, ids, past, *rest, **more)

        session.forward = recording
        for _ in range(2):
            assert ids_of(engine.generate(PROMPTS, LONG)) == expected
    assert all(past == 0 or length == 1 for length, past in shapes)
