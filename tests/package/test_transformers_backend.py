"""The torch_npu rung, on the CPU: the same greedy texts as the compiled model, batched, stopped and aborted alike."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from models.reasoner import data
from qcompile.cli.main import cli
from qcompile.runtime import Engine, RequestError, SamplingParams

WEIGHTS = Path(data.__file__).parent / "weights"
QUESTIONS = ("What is 2 + 3?", "计算 17 + 26。", "Which is larger, 3 or 5? Answer in one word.")

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]


def texts(backend: Any, params: SamplingParams) -> dict[int, tuple[str, str]]:
    numbers = [backend.add_request(backend.encode_chat([{"role": "user", "content": q}]), params) for q in QUESTIONS]
    found: dict[int, tuple[str, str]] = {}
    while len(found) < len(numbers):
        for delta in backend.step():
            if delta.completion is not None:
                found[numbers.index(delta.request_id)] = (delta.completion.text, delta.completion.finish_reason)
    return found


def test_it_answers_like_the_compiled_model(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from qcompile.package.contest.transformers_backend import TransformersBackend

    assert CliRunner().invoke(cli, ["export", str(WEIGHTS), "-o", str(tmp_path / "m")]).exit_code == 0
    params = SamplingParams(max_new_tokens=24, stop=["</think>"], include_stop=True)
    with Engine(tmp_path / "m", threads=1) as engine:
        expected = texts(engine, params)
    backend = TransformersBackend(WEIGHTS, 2, device="cpu")
    assert texts(backend, params) == expected
    drawn = SamplingParams(max_new_tokens=6, temperature=0.8, seed=5)
    assert texts(backend, drawn) == texts(backend, drawn)
    number = backend.add_request([1, 2], params)
    backend.abort(number)
    assert backend.step() == []
    with pytest.raises(RequestError):
        backend.add_request([], params)
    with pytest.raises((ImportError, RuntimeError)):
        TransformersBackend(WEIGHTS, 2)
    backend.close()
