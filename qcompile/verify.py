"""Run two models on the same prompts and judge the difference: logits step by step, and greedy tokens.

The reference chooses its own tokens; the other model is given the same ones, so that one early difference does not hide
what comes after. Both run through the runtime, in whatever interface their manifests declare.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.artifact import graph_io_of, load_model
from qcompile.ascend.reference_session import ReferenceSession
from qcompile.errors import GraphError, VerifyError
from qcompile.model_shape import describe_model
from qcompile.runtime.host import default_threads
from qcompile.runtime.manifest import MANIFEST_NAME, FileEntry, GraphEntry, Manifest
from qcompile.runtime.open_session import open_session
from qcompile.runtime.ort_session import open_ort_session
from qcompile.runtime.session import Session

NUM_TOKENS = 64
# Float graphs: sums in another order. Over 24 layers of a 0.5B model that is some 1e-4 in logits of up to 30.
MAX_LOGIT_DIFFERENCE = 2e-3
MIN_QUANTIZED_AGREEMENT = 0.8
MAX_QUANTIZED_KL = 0.1
_PROMPT_LENGTHS = (3, 24, 65)
_CHUNK = 32
_HALF_FACTOR = 50.0
_BFLOAT16_FACTOR = 400.0  # three bits fewer


@dataclass(frozen=True)
class Agreement:
    """How far two models agree on the same tokens.

    Attributes:
        num_tokens: Positions compared.
        max_logit_difference: Largest |a - b| over all logits.
        same_tokens: Positions where both choose the same token greedily.
        mean_kl: Mean KL(reference || other) in nats.
        max_kl: Largest KL of a position.
        is_half: One of the two computes in half precision.
        is_bfloat16: And that is bfloat16.
        first_difference: (prompt, position) of the first differing token, or None.
    """

    num_tokens: int
    max_logit_difference: float
    same_tokens: int
    mean_kl: float
    max_kl: float
    is_half: bool = False
    is_bfloat16: bool = False
    first_difference: tuple[int, int] | None = None

    @property
    def agreement(self) -> float:
        """Share of positions with the same greedy token."""
        return self.same_tokens / max(self.num_tokens, 1)

    def holds(self, *, quantized: bool) -> bool:
        """Whether the difference is what rounding explains (float), or within the limits for quantized weights."""
        if quantized:
            return self.agreement >= MIN_QUANTIZED_AGREEMENT and self.mean_kl <= MAX_QUANTIZED_KL
        half_factor = _BFLOAT16_FACTOR if self.is_bfloat16 else _HALF_FACTOR
        limit = MAX_LOGIT_DIFFERENCE * (half_factor if self.is_half else 1.0)
        return self.max_logit_difference <= limit and (self.is_half or self.same_tokens == self.num_tokens)

    def summary(self) -> str:
        """One line for people."""
        return (
            f"{self.same_tokens} of {self.num_tokens} greedy tokens are the same, largest logit difference "
            f"{self.max_logit_difference:.2g}, mean KL {self.mean_kl:.2g}"
        )

    def record(self) -> dict[str, Any]:
        """Return JSON-ready data."""
        return {**asdict(self), "agreement": self.agreement}


def compare_directories(
    reference: Path,
    other: Path,
    *,
    num_tokens: int = NUM_TOKENS,
    seed: int = 0,
    say: Callable[[str, int, int], None] | None = None,
) -> Agreement:
    """Compare two models on random prompts of several lengths, `num_tokens` greedy tokens each.

    Args:
        reference: A compiled-model directory or an .onnx file; it chooses the tokens.
        other: The model to judge.
        num_tokens: Tokens generated after each prompt.
        seed: Seed of the prompts.
        say: Called with (what, done, total).

    Raises:
        VerifyError: The two have different vocabularies, or one makes logits that are no numbers.
        QCompileError: One of them cannot be read or run.
    """
    report = say or (lambda what, done, total: None)
    rng = np.random.default_rng(seed)
    lengths, num_tokens = _lengths(min(_room(reference), _room(other)), num_tokens)
    first = _open(reference)
    prompts = [rng.integers(0, first.vocab_size, length) for length in lengths]
    steps = len(prompts) * num_tokens
    wanted = [
        _Trace.choose(first, prompt, num_tokens, _counter(report, "reference", i, num_tokens, steps))
        for i, prompt in enumerate(prompts)
    ]
    vocabulary, first_dtype = first.vocab_size, first.dtype
    first.close()
    del first
    gc.collect()
    second = _open(other)
    if second.vocab_size != vocabulary:
        raise VerifyError(f"{other}: vocabulary of {second.vocab_size}, {reference} has {vocabulary}: not one model")
    try:
        seen = [
            _Trace.follow(second, prompt, trace.tokens, _counter(report, "comparing", i, num_tokens, steps))
            for i, (prompt, trace) in enumerate(zip(prompts, wanted, strict=True))
        ]
        for path, traces in ((reference, wanted), (other, seen)):
            _check_finite(path, traces)
        return _judge(wanted, seen, {first_dtype, second.dtype})
    finally:
        second.close()


def _lengths(room: float, num_tokens: int) -> tuple[list[int], int]:
    """Return lengths of prompts, and tokens after each, that fit a KV cache of `room` tokens."""
    num_tokens = int(min(num_tokens, max(room // 2, 1)))
    return [int(min(length, max(room - num_tokens, 1))) for length in _PROMPT_LENGTHS], num_tokens


def _room(path: Path) -> float:
    """Return the largest KV cache that a directory of static graphs was made for; infinity for others."""
    if not (path / MANIFEST_NAME).is_file():
        return math.inf
    graphs = Manifest.load(path).graphs
    return max((entry.bucket[2] for entry in graphs if entry.bucket is not None), default=math.inf)


def _counter(
    report: Callable[[str, int, int], None], what: str, prompt: int, num_tokens: int, steps: int
) -> Callable[[int], None]:
    return lambda n: report(what, prompt * num_tokens + n, steps)


@dataclass
class _Opened:
    """A loaded model and its interface."""

    session: Session
    vocab_size: int
    dtype: str

    def close(self) -> None:
        self.session.close()


@dataclass
class _Trace:
    """Tokens chosen after a prompt, and the logits [num_tokens, V] they were chosen from."""

    tokens: list[int]
    logits: np.ndarray

    @classmethod
    def choose(cls, model: _Opened, prompt: np.ndarray, num_tokens: int, step: Callable[[int], None]) -> _Trace:
        return cls._run(model, prompt, num_tokens, None, step)

    @classmethod
    def follow(cls, model: _Opened, prompt: np.ndarray, tokens: list[int], step: Callable[[int], None]) -> _Trace:
        return cls._run(model, prompt, len(tokens), tokens, step)

    @classmethod
    def _run(
        cls, model: _Opened, prompt: np.ndarray, num_tokens: int, given: list[int] | None, step: Callable[[int], None]
    ) -> _Trace:
        session = model.session
        session.reserve(1, len(prompt) + num_tokens)
        chunk = min(session.max_chunk, _CHUNK) if session.can_extend else len(prompt)
        scores: Any = None
        past = 0
        for start in range(0, len(prompt), chunk):
            part = prompt[start : start + chunk]
            scores = session.forward(0, part[None].astype(np.int64), [past])
            past += len(part)
        tokens: list[int] = []
        rows = []
        for position in range(num_tokens):
            row = np.array(scores.values[0], dtype=np.float32)
            rows.append(row)
            tokens.append(int(row.argmax()))
            step(position + 1)
            if position + 1 < num_tokens:
                token = tokens[-1] if given is None else given[position]
                scores = session.forward(0, np.array([[token]], dtype=np.int64), [past])
                past += 1
        return cls(tokens, np.stack(rows))


def _check_finite(path: Path, traces: list[_Trace]) -> None:
    for index, trace in enumerate(traces):
        bad = ~np.isfinite(trace.logits).all(axis=1)
        if bad.any():
            raise VerifyError(
                f"{path}: the logits of prompt {index}, token {int(np.argmax(bad))} are infinite or NaN: a value is beyond "
                "its type; take a wider one (--ascend-dtype bf16, --dtype fp32)"
            )


def _judge(wanted: list[_Trace], seen: list[_Trace], dtypes: set[str]) -> Agreement:
    divergences, worst, same, first = [], 0.0, 0, None
    for index, (a, b) in enumerate(zip(wanted, seen, strict=True)):
        worst = max(worst, float(np.abs(a.logits - b.logits).max()))
        divergences.append(_kl(a.logits, b.logits))
        equal = np.array(a.tokens) == np.array(b.tokens)
        same += int(equal.sum())
        if first is None and not equal.all():
            first = (index, int(np.argmin(equal)))
    kl = np.concatenate(divergences)
    return Agreement(
        len(kl), worst, same, float(kl.mean()), float(kl.max()), dtypes != {"float32"}, "bfloat16" in dtypes, first
    )


def _kl(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(reference || other) per row of logits [n, V], in nats; float64 sums."""
    p, q = _log_softmax(reference), _log_softmax(other)
    return np.asarray(np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0.0))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _open(path: Path) -> _Opened:
    """Open a compiled-model directory, or an .onnx file without a manifest."""
    if path.is_dir() and (path / MANIFEST_NAME).is_file():
        directory, manifest = path, Manifest.load(path)
    elif path.is_file() and (path.parent / MANIFEST_NAME).is_file():
        directory, manifest = path.parent, Manifest.load(path.parent)
    else:
        directory, manifest = _bare(path)
    io = manifest.graphs[0].io
    session: Session
    if io.kv_cache == "appended":
        session = _open_static(directory, manifest)
    else:
        session = open_ort_session(directory, manifest, check_hash=False)
    return _Opened(session, manifest.model.vocab_size, io.dtype)


def _open_static(directory: Path, manifest: Manifest) -> Session:
    """Open static graphs by the definitions of their operators, or on the device they were compiled for."""
    if not all(entry.file.name.endswith(".om") for entry in manifest.graphs):
        return ReferenceSession(directory, manifest, default_threads())
    if not all("logits" in entry.io.outputs for entry in manifest.graphs):
        raise VerifyError(
            f"{directory}: its .om files return only the tokens they choose; lower the model with --keep-logits to compare "
            "what a device computes"
        )
    return open_session(directory, manifest, None, check_hash=False)


def _bare(path: Path) -> tuple[Path, Manifest]:
    path = path / "model.onnx" if path.is_dir() else path
    model = load_model(path)
    entry = FileEntry(path.name, path.stat().st_size, "")
    try:
        shape, config = describe_model(model, path.parent, None)
        graph = GraphEntry("decoder", entry, (), graph_io_of(model))
    except GraphError as error:
        raise GraphError(f"{path}: {error}") from error
    return path.parent, Manifest(target="portable", model=shape, graphs=(graph,), config=config)
