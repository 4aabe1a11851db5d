"""Prompts of different lengths, and what the engine tests ask of them."""

from qcompile.runtime import Completion, SamplingParams

PROMPTS = [
    "Hello, what is the capital of France?",
    "你好，世界！请用中文回答",
    "x",
    "def add(a, b):\n    return a + b\n" * 8,
    "12 + 30 =",
]
LONG = SamplingParams(max_new_tokens=24, ignore_eos=True)


def ids_of(completions: list[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]
