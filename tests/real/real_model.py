"""The real 0.5B model for the tests: commands measured, weights for transformers, prompts, tokens."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.runtime import Tokenizer
from qcompile.runtime.manifest import Manifest
from qcompile.runtime.ort_session import open_ort_session

RECIPE = "qwen2.5-coder-0.5b-instruct"
NUM_TOKENS = 128
_LONG = (
    "The compiler reads a graph, finds what belongs together and writes one operator in its place. "
    "Every replacement is run beside the nodes it replaces, on random inputs with the real weights. "
)
# name -> user message; `long` is cut to exactly 700 tokens, template included
PROMPTS = {
    "english": "Explain in three sentences why the sky is blue.",
    "chinese": "用三句话解释为什么天空是蓝色的。",
    "code": "Write a Python function that returns the n-th Fibonacci number, with a docstring and a test.",
    "arithmetic": "A shop sells 17 apples a day at 3 yuan each. How much does it earn in 12 days? Explain.",
    "long": "Summarize this text and list its main points:\n" + _LONG * 40,
}
LONG_TOKENS = 700


@dataclass(frozen=True)
class Measured:
    """What a command printed with --json, and what it took."""

    record: dict[str, Any]
    seconds: float
    peak_rss_bytes: int


def qcompile(work: Path, name: str, *arguments: str | Path) -> Measured:
    """Run a qcompile command with --json in a process of its own, measured; fails with what it said."""
    figures = work / f"{name}.figures.json"
    command = [sys.executable, "-m", "qcompile.cli.main", *map(str, arguments), "--json"]
    measure = [sys.executable, str(Path(__file__).with_name("measure.py")), str(figures)]
    finished = subprocess.run([*measure, *command], capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise AssertionError(f"{' '.join(command)}: exit {finished.returncode}\n{finished.stderr[-2000:]}")
    took = json.loads(figures.read_text(encoding="utf-8"))
    print(f"\n{name}: {took['seconds']:.1f} s, peak RSS {took['peak_rss_bytes'] / 1e6:.0f} MB", flush=True)
    return Measured(json.loads(finished.stdout), took["seconds"], took["peak_rss_bytes"])


def prompt_ids(directory: Path) -> dict[str, list[int]]:
    """Return token ids per prompt, in the chat template; the long one has 700."""
    tokenizer = Tokenizer(directory, Manifest.load(directory))
    ids = {}
    for name, text in PROMPTS.items():
        rendered = tokenizer.chat_template.render([{"role": "user", "content": text}])
        ids[name] = tokenizer.encode(rendered, add_special_tokens=False)
    tail = ids["english"][-5:]  # <|im_end|> \n <|im_start|> assistant \n
    ids["long"] = ids["long"][: LONG_TOKENS - len(tail)] + tail
    assert len(ids["long"]) == LONG_TOKENS
    return ids


@dataclass(frozen=True)
class Trace:
    """Greedy tokens and the logits [128, V] they were chosen from."""

    tokens: list[int]
    logits: np.ndarray


def torch_traces(checkpoint: Path, prompts: dict[str, list[int]]) -> dict[str, Trace]:
    """Generate with transformers, eager attention, float32, a KV cache and no early stop."""
    from tests.export.onnx_decoder import TorchDecoder

    decoder = TorchDecoder(checkpoint)
    traces = {}
    for name, ids in prompts.items():
        decoder.cache = None
        traces[name] = stepped(decoder, ids)
    return traces


def stepped(decoder: Any, ids: list[int]) -> Trace:
    """Generate greedily with a decoder that returns all logits of a step."""
    prompt = decoder.step(*_step(ids, 0))[0]
    logits = [prompt[-1].copy()]
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < NUM_TOKENS:
        logits.append(decoder.step(*_step(tokens[-1:], len(ids) + len(tokens) - 1))[0, -1].copy())
        tokens.append(int(logits[-1].argmax()))
    return Trace(tokens, np.stack(logits))


def _step(ids: list[int], past: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    total = past + len(ids)
    return (
        np.array([ids], np.int64),
        np.ones((1, total), np.int64),
        np.arange(past, total, dtype=np.int64)[None],
    )


def session_traces(directory: Path, prompts: dict[str, list[int]]) -> dict[str, Trace]:
    """Generate with the runtime's session on a compiled-model directory."""
    return traces_of(open_ort_session(directory, Manifest.load(directory)), prompts, NUM_TOKENS)


def traces_of(session: Any, prompts: dict[str, list[int]], num_tokens: int) -> dict[str, Trace]:
    """Generate greedily with a session, and close it."""
    try:
        session.reserve(1, max(map(len, prompts.values())) + num_tokens)
        return {name: _session_trace(session, ids, num_tokens) for name, ids in prompts.items()}
    finally:
        session.close()


def _session_trace(session: Any, ids: list[int], num_tokens: int) -> Trace:
    chunk = session.max_chunk if session.can_extend else len(ids)
    for start in range(0, len(ids), chunk):
        part = np.array([ids[start : start + chunk]], np.int64)
        scores = session.forward(0, part, [start])
    logits, tokens = [], []
    while True:
        logits.append(np.array(scores.values[0], np.float32))
        tokens.append(int(logits[-1].argmax()))
        if len(tokens) == num_tokens:
            return Trace(tokens, np.stack(logits))
        past = len(ids) + len(tokens) - 1
        scores = session.forward(0, np.array([[tokens[-1]]], np.int64), [past])
