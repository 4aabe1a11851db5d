"""Greedy text, token for token, against transformers on the same weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompile.runtime import Engine, SamplingParams
from qcompile.runtime.sampling import Sampler

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Hello 你好 🙂"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 12 + 30?"},
        {"role": "assistant", "content": "42 <tool_call>"},
        {"role": "user", "content": "And <|im_end|> 7 * 8?"},
    ],
    [{"role": "user", "content": "def add(a, b):\n    return a + b\n" * 10}],
]


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def pair(request: pytest.FixtureRequest, compiled: Callable[..., Path]) -> tuple[Any, Any, dict[str, Path]]:
    directories = {style: compiled(request.param, kv_cache=style) for style in ("shared", "concat")}
    checkpoint = directories["shared"].parent / "checkpoint"
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(checkpoint), directories


def greedy(model: Any, ids: list[int], count: int, **options: Any) -> list[int]:
    given = torch.tensor([ids])
    plain = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    output = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=count, **plain, **options)
    return list(output[0, len(ids) :].tolist())


@pytest.mark.parametrize("style", ["shared", "concat"])
def test_greedy_text(pair: Any, style: str) -> None:
    model, tokenizer, directories = pair
    params = SamplingParams(max_new_tokens=64)
    with Engine(directories[style], threads=1) as engine:
        prompts = [engine.encode_chat(conversation) for conversation in CONVERSATIONS]
        for conversation, ids in zip(CONVERSATIONS, prompts, strict=True):
            rendered = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
            assert ids == list(rendered)
        for ids, completion in zip(prompts, engine.generate(prompts, params), strict=True):
            expected = greedy(model, ids, 64)
            assert completion.token_ids == expected
            assert completion.text == tokenizer.decode(expected, skip_special_tokens=True)


def test_repetition_penalty(pair: Any) -> None:
    model, _, directories = pair
    with Engine(directories["shared"], threads=1) as engine:
        ids = engine.encode_chat(CONVERSATIONS[0])
        got = engine.generate([ids], SamplingParams(max_new_tokens=48, repetition_penalty=1.3))[0]
    assert got.token_ids == greedy(model, ids, 48, repetition_penalty=1.3)


def test_raw_prompts(pair: Any) -> None:
    model, tokenizer, directories = pair
    with Engine(directories["shared"], threads=1) as engine:
        for text in ("The quick brown", "你好", "<|im_start|>user\n"):
            ids = tokenizer(text)["input_ids"]
            assert engine.tokenizer.encode(text) == ids
            assert engine.generate(text, SamplingParams(max_new_tokens=20))[0].token_ids == greedy(model, ids, 20)


def test_logprobs(pair: Any) -> None:
    model, _, directories = pair
    with Engine(directories["shared"], threads=1) as engine:
        ids = engine.encode_chat(CONVERSATIONS[0])
        completion = engine.generate([ids], SamplingParams(max_new_tokens=10, logprobs=5))[0]
    with torch.no_grad():
        logits = model(torch.tensor([ids + completion.token_ids])).logits[0, len(ids) - 1 : -1]
    expected = torch.log_softmax(logits.double(), dim=-1).numpy()
    assert completion.logprobs is not None
    for row, token in zip(expected, completion.logprobs, strict=True):
        assert abs(row[token.token_id] - token.logprob) < 1e-4
        assert [token_id for token_id, _ in token.top] == np.argsort(-row)[:5].tolist()


@pytest.mark.parametrize("top_k", [0, 1, 7])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.2])
@pytest.mark.parametrize("min_p", [0.0, 0.1])
@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_the_tokens_that_can_be_drawn(top_k: int, top_p: float, min_p: float, penalty: float) -> None:
    """Every token that the warpers of Hugging Face leave is drawn, with their probability; no other is."""
    processors = transformers.generation.logits_process
    rng = np.random.default_rng(5)
    row = (rng.standard_normal(30) * 2).astype(np.float32)
    seen = [3, 4, int(row.argmax())]
    scores = torch.tensor(row[None])
    if penalty != 1.0:
        scores = processors.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), scores)
    scores = processors.TemperatureLogitsWarper(0.7)(None, scores)
    if top_k:
        scores = processors.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = processors.TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = processors.MinPLogitsWarper(min_p)(None, scores)
    expected = torch.softmax(scores[0], dim=-1).numpy()
    params = SamplingParams(temperature=0.7, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty, seed=1)
    count = 6000
    drawn = np.zeros(30)
    sampler = Sampler(params, seen)
    for _ in range(count):
        sampler._seen = set(seen)
        drawn[sampler.choose(row).token_id] += 1
    assert not drawn[expected == 0].any()
    np.testing.assert_allclose(drawn / count, expected, atol=0.025)
