"""On a fused graph an answer does not depend on what else is being computed: bit for bit, not only token by token."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from qcompile.evaluate import read_cases
from qcompile.evaluate.templates import Templates
from qcompile.export.export_checkpoint import export_checkpoint
from qcompile.runtime import Engine, SamplingParams
from tests.optimized import export_tiny, optimize_tiny
from tests.serve.conftest import NAME, Running, running

WEIGHTS = Path(__file__).parents[2] / "models" / "reasoner" / "weights"
SYSTEM = {"role": "system", "content": "You are a helpful assistant. Answer every question."}


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fused")
    optimize_tiny(export_tiny(folder), folder / "fused")
    return folder / "fused"


def conversation(i: int) -> list[dict[str, str]]:
    return [SYSTEM, {"role": "user", "content": f"Number {i}. " + "The quick brown fox. " * (i % 5)}]


def test_log_probabilities_are_those_of_one_request_alone(fused: Path) -> None:
    with Engine(fused, threads=1, max_batch_size=1, reuse_prefixes=False) as alone:
        params = SamplingParams(max_new_tokens=20, logprobs=0, ignore_eos=True)
        want = [[one.logprob for one in alone.chat(conversation(i), params)[0].logprobs or []] for i in range(16)]
    with running(fused, batch=8) as served:

        def ask(i: int) -> list[float]:
            options: dict[str, Any] = {
                "max_tokens": 20,
                "logprobs": True,
                "temperature": 0,
                "extra_body": {"ignore_eos": True},
            }
            answer = served.openai.chat.completions.create(model=NAME, messages=conversation(i), **options)  # type: ignore[call-overload]
            return [one.logprob for one in answer.choices[0].logprobs.content]

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(ask, range(16))) == want
        assert served.metric("qcompile_reused_prompt_tokens_total") > 0


@pytest.fixture(scope="module")
def reasoner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    output = tmp_path_factory.mktemp("reasoner") / "exported"
    export_checkpoint(str(WEIGHTS), output, dtype="fp32")
    with running(output, reasoning="think-answer") as served:
        yield served


def test_thinking_and_answer_of_the_bundled_reasoner(reasoner: Running) -> None:
    case = next(case for case in read_cases(WEIGHTS.parent / "test.jsonl")[0] if case.id == "test-math-002")  # 45 x 8
    question: Any = Templates.load().messages(case)
    create = reasoner.openai.chat.completions.create
    message = create(model=NAME, messages=question).choices[0].message  # greedy: its generation config says so
    thinking = message.model_extra["reasoning_content"]
    assert "360" in thinking
    assert message.content.endswith("\\boxed{360}")
    assert not any(tag in thinking + message.content for tag in ("think>", "answer>"))
    sides = {"reasoning_content": "", "content": ""}
    for chunk in create(model=NAME, messages=question, stream=True):
        delta = chunk.choices[0].delta
        sides["content"] += delta.content or ""
        sides["reasoning_content"] += (delta.model_extra or {}).get("reasoning_content", "")
    assert sides == {"reasoning_content": thinking, "content": message.content}
