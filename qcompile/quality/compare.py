"""Compare two models on a text: both read the same tokens in turns, chunk by chunk, and are judged at once.

    report = compare_models(Path("qwen"), Path("qwen-int8"), CompareOptions(num_tokens=1000))
    print(report.overall.mean_kl)

Nothing of size [tokens, vocabulary] is ever held: a chunk's logits are reduced to four numbers per token.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.errors import QCompileError, QualityError
from qcompile.quality.divergence import RowScorer, Summary, TokenScores
from qcompile.quality.documents import (
    PROMPTS,
    Document,
    TokenizedDocument,
    built_in_documents,
    read_documents,
    tokenize,
)
from qcompile.quality.greedy import AnyScorer, GreedyAgreement, greedy_agreement
from qcompile.quality.layers import LayerMeter, LayerReport
from qcompile.quality.models import OpenedModel, Say, open_model
from qcompile.quality.scorer import Scorer
from qcompile.quality.session_scorer import SessionScorer
from qcompile.quality.windows import Window, shares, windows_of
from qcompile.runtime.host import default_threads
from qcompile.runtime.tokenizer import Tokenizer

DEFAULT_CONTEXT = 1024
NUM_WORST = 5
_SNIPPET_TOKENS = 12


@dataclass(frozen=True)
class CompareOptions:
    """What to compare on, and how.

    Attributes:
        data: A text or .jsonl file; None takes the built-in set.
        prompts: A text or .jsonl file of prompts for the greedy comparison; None takes four built-in ones.
        num_tokens: The most tokens to score, shared among the documents.
        context: The most tokens a model sees at once; None takes 1024, or the models' own limit if less.
        stride: Step from window to window; None takes half the context.
        chunk: Tokens per forward pass; 1 compares the decode path.
        greedy_tokens: Tokens written per prompt; 0 leaves that out.
        with_layers: Look at the hidden states.
        threads: None takes every physical core.
    """

    data: Path | None = None
    prompts: Path | None = None
    num_tokens: int | None = 20_000
    context: int | None = None
    stride: int | None = None
    chunk: int = 128
    greedy_tokens: int = 64
    with_layers: bool = True
    threads: int | None = None


@dataclass(frozen=True)
class WorstToken:
    """A token on which the models' distributions differ most."""

    kl: float
    group: str
    position: int
    before: str
    token: str


@dataclass
class QualityReport:
    """Everything `qcompile quality` says.

    Attributes:
        reference: The reference model, as `OpenedModel.record` gives it.
        other: The model that is judged.
        text: What was read: source, tokens, windows.
        overall: All tokens.
        groups: The same per group of documents.
        scores: Per token, in order; what charts are drawn from.
        greedy: One entry per prompt.
        layers: Hidden states.
        worst: The tokens with the largest KL.
        notes: What the reader should know (an export, a text shorter than asked, a slower way of running).
        seconds: How long it took.
    """

    reference: dict[str, Any]
    other: dict[str, Any]
    text: dict[str, Any]
    overall: Summary
    groups: dict[str, Summary]
    scores: TokenScores
    greedy: list[GreedyAgreement]
    layers: LayerReport
    worst: list[WorstToken]
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


def compare_models(
    reference: Path, other: Path, options: CompareOptions | None = None, say: Say | None = None
) -> QualityReport:
    """Compare `other` with `reference`.

    Args:
        reference: A compiled-model directory, an .onnx file, or a checkpoint (exported to fp32).
        other: The same.
        options: See CompareOptions.
        say: Called with (what, done, total).

    Raises:
        QualityError: The models or the text do not fit together, or one of them cannot be run.
        QCompileError: A file is damaged.
    """
    options = options or CompareOptions()
    report = say or (lambda what, done, total: None)
    started = time.perf_counter()
    models = (open_model(reference, report), open_model(other, report))
    _check_vocabularies(*models)
    run = _Run(models, options, report)
    try:
        done = run.compare()
    finally:
        run.close()
    done.seconds = time.perf_counter() - started
    return done


def _check_vocabularies(reference: OpenedModel, other: OpenedModel) -> None:
    a, b = reference.shape.vocab_size, other.shape.vocab_size
    if a != b:
        raise QualityError(
            f"{other.name} has a vocabulary of {b}, {reference.name} of {a}: token by token they cannot be compared"
        )


class _Run:
    """One comparison: the text, both models loaded, and what has been gathered."""

    def __init__(self, models: tuple[OpenedModel, OpenedModel], options: CompareOptions, say: Say) -> None:
        self.models, self.options, self.say = models, options, say
        self.notes = [m.note for m in models if m.note]
        self.context, self.stride = _context(models, options)
        self.reader = _Reader(models)
        threads = options.threads or default_threads()
        self.rows = RowScorer((models[0].name, models[1].name), threads)
        self.documents, self.available = self._read_text()
        self.prompts = self._read_prompts()
        capacity = max([self.context, *(len(p.ids) + options.greedy_tokens for p in self.prompts)])
        self.scorers: list[AnyScorer] = []
        try:
            for i, model in enumerate(models):
                say(f"loading {Path(model.name).name}", i, 2)
                self.scorers.append(_scorer(model, capacity, threads, with_stream=options.with_layers))
        except QCompileError:
            self.close()
            raise
        streams = [s.stream for s in self.scorers]
        self.meter = LayerMeter(len(streams[0]) if all(streams) else 0)
        self.parts: dict[str, list[TokenScores]] = {}
        self.worst: list[tuple[float, int, WorstToken]] = []
        self.done = 0

    def compare(self) -> QualityReport:
        """Read the text, then let both write."""
        windows = [windows_of(len(d.ids), self.context, self.stride) for d in self.documents]
        total = sum(window.num_scored for each in windows for window in each)
        for document, each in zip(self.documents, windows, strict=True):
            for window in each:
                self._score_window(document, window, total)
        greedy = self._write()
        groups = {name: TokenScores.joined(parts) for name, parts in self.parts.items()}
        everything = TokenScores.joined(list(groups.values()))
        for scorer in self.scorers:
            if not scorer.scores_all:
                self.notes.append(f"{scorer.model.name}: its graph scores one position per call; run token by token")
        return QualityReport(
            reference=self.models[0].record(),
            other=self.models[1].record(),
            text=self._text_record(total),
            overall=Summary.of(everything),
            groups={name: Summary.of(scores) for name, scores in groups.items()},
            scores=everything,
            greedy=greedy,
            layers=self._layers(float(everything.kl.mean())),
            worst=[w for _, _, w in sorted(self.worst, key=lambda item: -item[0])],
            notes=self.notes,
        )

    def close(self) -> None:
        """Release both models."""
        self.rows.close()
        for scorer in self.scorers:
            scorer.close()

    def _read_text(self) -> tuple[list[TokenizedDocument], int]:
        data = self.options.data
        documents = self.reader.tokenize(read_documents(data) if data is not None else built_in_documents())
        available = sum(max(len(d.ids) - 1, 0) for d in documents)
        limit = self.options.num_tokens
        if limit is not None and available < limit and data is not None:
            self.notes.append(f"{data}: has {available} tokens to score, {limit} were asked for")
        kept = shares([len(d.ids) for d in documents], limit)
        cut = [TokenizedDocument(d.group, d.ids[:n]) for d, n in zip(documents, kept, strict=True) if n > 1]
        if not cut:
            raise QualityError(f"{data or 'the built-in text'}: no token to score; ask for more with --tokens")
        return cut, available

    def _read_prompts(self) -> list[TokenizedDocument]:
        if not self.options.greedy_tokens:
            if self.options.prompts is not None:
                raise QualityError(
                    f"{self.options.prompts}: prompts are for greedy answers, which --greedy 0 leaves out"
                )
            return []
        if self.options.prompts is not None:
            prompts = self.reader.tokenize(read_documents(self.options.prompts, with_answers=False), as_prompts=True)
        elif self.reader.tokenizer is None:
            return []
        else:
            prompts = self.reader.chat_prompts()
        longest = min(m.max_tokens for m in self.models) - self.options.greedy_tokens
        too_long = max((len(p.ids) for p in prompts), default=0)
        if too_long > longest:
            where = f"{self.options.prompts or 'the built-in prompts'}: a prompt of {too_long} tokens"
            where = f"{where}, room is for {max(longest, 0)} beside {self.options.greedy_tokens} written ones"
            if self.options.prompts is not None:
                raise QualityError(f"{where}; shorten it, or write fewer tokens with --greedy")
            self.notes.append(f"{where}: prompts that do not fit are left out")
        return [p for p in prompts if 0 < len(p.ids) <= longest]

    def _score_window(self, document: TokenizedDocument, window: Window, total: int) -> None:
        for scorer in self.scorers:
            scorer.reset()
        ids = np.asarray(document.ids, np.int64)
        for start in range(window.start, window.stop - 1, self.options.chunk):
            stop = min(start + self.options.chunk, window.stop - 1)
            scored = [scorer.extend(ids[start:stop]) for scorer in self.scorers]
            first = max(window.first_scored - 1 - start, 0)
            if first >= stop - start:
                continue
            following = ids[start + first + 1 : stop + 1]
            rows = self.rows.score(scored[0].logits[first:], scored[1].logits[first:], following)
            self.meter.add(scored[0].stream, scored[1].stream, first)
            self.parts.setdefault(document.group, []).append(rows)
            self._note_worst(document, start + first + 1, rows)
            self.done += len(rows)
            self.say("reading", self.done, total)

    def _note_worst(self, document: TokenizedDocument, first: int, rows: TokenScores) -> None:
        for i in np.argsort(-rows.kl, kind="stable")[:NUM_WORST]:
            kl, position = float(rows.kl[i]), first + int(i)
            if kl <= 0 or (len(self.worst) == NUM_WORST and kl <= self.worst[0][0]):
                return
            before = self.reader.decode(document.ids[max(0, position - _SNIPPET_TOKENS) : position])
            token = self.reader.decode(document.ids[position : position + 1])
            entry = (kl, -self.done - position, WorstToken(kl, document.group, position, before, token))
            (heapq.heappush if len(self.worst) < NUM_WORST else heapq.heapreplace)(self.worst, entry)

    def _write(self) -> list[GreedyAgreement]:
        done = []
        for i, prompt in enumerate(self.prompts):
            self.say("writing", i, len(self.prompts))
            limit, chunk = self.options.greedy_tokens, self.options.chunk
            done.append(greedy_agreement(self.scorers[0], self.scorers[1], prompt, limit, self.reader.ends, chunk))
        return done

    def _layers(self, mean_kl: float) -> LayerReport:
        reasons = [f"{s.model.name}: {s.stream_reason}" for s in self.scorers if s.stream_reason]
        reason = "; ".join(reasons) if self.options.with_layers else "left out"
        is_half = any(m.manifest.graphs[0].io.dtype != "float32" for m in self.models)
        return self.meter.report(reason, is_half=is_half, mean_kl=mean_kl)

    def _text_record(self, total: int) -> dict[str, Any]:
        return {
            "source": str(self.options.data) if self.options.data is not None else "built-in",
            "num_documents": len(self.documents),
            "num_tokens": total,
            "num_available": self.available,
            "context": self.context,
            "stride": self.stride,
            "chunk": self.options.chunk,
        }


def _scorer(model: OpenedModel, capacity: int, threads: int, *, with_stream: bool) -> AnyScorer:
    """Load a model; graphs of fixed shapes run by their operators' definitions."""
    if model.is_static:
        return SessionScorer(model, capacity, threads)
    return Scorer(model, capacity, threads, with_stream=with_stream)


class _Reader:
    """Both models' tokenizers, known to agree on the texts."""

    def __init__(self, models: tuple[OpenedModel, OpenedModel]) -> None:
        self.models = models
        self.tokenizers = [m.tokenizer() for m in models]
        pairs = [(m, t) for m, t in zip(models, self.tokenizers, strict=True) if t is not None]
        self.tokenizer: Tokenizer | None = pairs[0][1] if pairs else None
        self.ends = pairs[0][0].end_ids(pairs[0][1]) if pairs else set()
        self.vocab_size = models[0].shape.vocab_size

    def tokenize(self, documents: list[Document], *, as_prompts: bool = False) -> list[TokenizedDocument]:
        """Turn documents into ids, with every tokenizer there is.

        Args:
            documents: Texts.
            as_prompts: Conversations end with the opening of the assistant's turn, and one token is enough.

        Raises:
            QualityError: There is no tokenizer, or the two models' tokenizers differ on these texts.
        """
        seen = [self._with(t, documents, as_prompts=as_prompts) for t in self.tokenizers if t is not None]
        if not seen:
            return tokenize(documents, _no_tokenizer, _no_tokenizer, self.vocab_size, 1 if as_prompts else 2)
        if len(seen) == 2 and seen[0] != seen[1]:
            where = next(d.where for d, a, b in zip(documents, *seen, strict=True) if a != b)
            raise QualityError(
                f"{self.models[1].name}: its tokenizer cuts {where} into other tokens than that of "
                f"{self.models[0].name}; these are not two forms of one model"
            )
        return seen[0]

    def chat_prompts(self) -> list[TokenizedDocument]:
        """Return the built-in prompts, as a conversation where the model has a chat template."""
        chat = self.tokenizer is not None and self.tokenizer.has_chat_template
        documents = [
            Document(group, f"built-in prompt {group}", messages=({"role": "user", "content": text},))
            if chat
            else Document(group, f"built-in prompt {group}", text=text)
            for group, text in PROMPTS
        ]
        return self.tokenize(documents, as_prompts=True)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""
        if self.tokenizer is None:
            return " ".join(map(str, ids))
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def _with(self, tokenizer: Tokenizer, documents: list[Document], *, as_prompts: bool) -> list[TokenizedDocument]:
        def render(messages: Sequence[dict[str, Any]]) -> list[int]:
            text = tokenizer.chat_template.render(messages, add_generation_prompt=as_prompts)
            return tokenizer.encode(text, add_special_tokens=False)

        return tokenize(documents, tokenizer.encode, render, self.vocab_size, 1 if as_prompts else 2)


def _no_tokenizer(text: Any) -> list[int]:
    raise QualityError('no tokenizer.json beside either model: give token ids, --data FILE.jsonl with {"ids": [...]}')


def _context(models: Sequence[OpenedModel], options: CompareOptions) -> tuple[int, int]:
    """Return context and stride, checked against what the models can hold."""
    most = min(m.max_tokens for m in models)
    context = options.context if options.context is not None else min(DEFAULT_CONTEXT, most)
    if context > most:
        raise QualityError(f"context {context}: the models hold at most {most} tokens")
    stride = options.stride if options.stride is not None else max(1, context // 2)
    windows_of(0, context, stride)
    return context, stride
