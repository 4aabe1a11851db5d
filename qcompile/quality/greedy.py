"""How long two models write the same text: greedy decoding from the same prompts, up to the first other token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qcompile.quality.documents import TokenizedDocument
from qcompile.quality.scorer import Scorer
from qcompile.quality.session_scorer import SessionScorer

AnyScorer = Scorer | SessionScorer


@dataclass(frozen=True)
class GreedyAgreement:
    """One prompt.

    Attributes:
        group: Kind of prompt.
        num_prompt_tokens: Tokens of the prompt.
        num_tokens: Tokens the reference wrote (it ended by itself, or reached the limit).
        num_same: Tokens before the first difference.
        reference_token: The reference's token there; None if they never differ.
        other_token: The other model's.
    """

    group: str
    num_prompt_tokens: int
    num_tokens: int
    num_same: int
    reference_token: int | None = None
    other_token: int | None = None


def write_greedily(scorer: AnyScorer, prompt: Sequence[int], limit: int, ends: set[int], chunk: int) -> list[int]:
    """Return the tokens the model writes after a prompt, its ending token included."""
    tokens = [_prefill(scorer, prompt, chunk)]
    while len(tokens) < limit and tokens[-1] not in ends:
        tokens.append(_next(scorer, tokens[-1]))
    return tokens


def follow_greedily(
    scorer: AnyScorer, prompt: Sequence[int], tokens: Sequence[int], chunk: int
) -> tuple[int, int | None]:
    """Return how many of `tokens` the model would write too, and the first other token it chooses."""
    chosen = _prefill(scorer, prompt, chunk)
    for i, token in enumerate(tokens):
        if chosen != token:
            return i, chosen
        if i + 1 < len(tokens):
            chosen = _next(scorer, token)
    return len(tokens), None


def greedy_agreement(
    reference: AnyScorer, other: AnyScorer, prompt: TokenizedDocument, limit: int, ends: set[int], chunk: int
) -> GreedyAgreement:
    """Let both models write after one prompt."""
    tokens = write_greedily(reference, prompt.ids, limit, ends, chunk)
    same, chosen = follow_greedily(other, prompt.ids, tokens, chunk)
    wanted = tokens[same] if chosen is not None else None
    return GreedyAgreement(prompt.group, len(prompt.ids), len(tokens), same, wanted, chosen)


def _prefill(scorer: AnyScorer, prompt: Sequence[int], chunk: int) -> int:
    scorer.reset()
    ids = np.asarray(prompt, np.int64)
    for start in range(0, len(ids), chunk):
        scored = scorer.extend(ids[start : start + chunk])
    return int(scored.logits[-1].argmax())


def _next(scorer: AnyScorer, token: int) -> int:
    return int(scorer.extend(np.array([token], np.int64)).logits[-1].argmax())
