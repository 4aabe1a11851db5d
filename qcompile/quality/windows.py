"""Which tokens are scored in which context: overlapping windows, the usual recipe for perplexity on long texts.

    tokens   0 ......................... n
    window 1 [0 ---- scored ----- C)
    window 2        [s .. context .. | scored C+s)          stride s, context length C

Every token but the first of a document is scored exactly once, with at least C - s tokens before it where there are
that many (Hugging Face's "perplexity of fixed-length models").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qcompile.errors import QualityError

MIN_TOKENS = 2
_FEWEST_DOCUMENTS, _DOCUMENT_TOKENS = 8, 256


@dataclass(frozen=True)
class Window:
    """Tokens [start, stop) of a document are given; those from `first_scored` on are scored.

    `first_scored` > start: the token at `start` has nothing before it.
    """

    start: int
    stop: int
    first_scored: int

    @property
    def num_scored(self) -> int:
        """Tokens scored in this window."""
        return self.stop - self.first_scored


def windows_of(num_tokens: int, context: int, stride: int) -> list[Window]:
    """Cut one document.

    Args:
        num_tokens: Tokens of the document.
        context: C, at least 2.
        stride: 1 to C - 1, or C for windows that do not overlap (then the first token of each is not scored).

    Raises:
        QualityError: context or stride is out of range.
    """
    if context < MIN_TOKENS or not 1 <= stride <= context:
        raise QualityError(f"context {context} and stride {stride}: wanted 2 <= context and 1 <= stride <= context")
    windows = []
    scored = 1
    for start in range(0, max(num_tokens - 1, 0), stride):
        stop = min(start + context, num_tokens)
        first = max(scored, start + 1)
        if first < stop:
            windows.append(Window(start, stop, first))
        scored = stop
        if stop == num_tokens:
            break
    return windows


def shares(lengths: Sequence[int], limit: int | None) -> list[int]:
    """Say how many tokens of each document to take, so that `limit` are scored and each has its share.

    Tokens at the beginning of a text are hard to predict and say little about the rest: rather than a few tokens of many
    documents, some 256 are taken of documents spread evenly over the list (of eight at least).

    Args:
        lengths: Tokens of each document; one of n tokens has n - 1 to score.
        limit: Tokens to score in all; None takes everything.

    Returns:
        Tokens to keep of each document, from its beginning; 0 for one that is left out or has nothing to score.
    """
    available = [max(n - 1, 0) for n in lengths]
    if limit is None or limit >= sum(available):
        return [n + 1 if n else 0 for n in available]
    available = _spread(available, limit)
    total = sum(available)
    exact = [n * limit / total for n in available]
    taken = [int(x) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (taken[i] - exact[i], i))
    for i in by_remainder[: limit - sum(taken)]:
        taken[i] += 1
    return [n + 1 if n else 0 for n in taken]


def _spread(available: list[int], limit: int) -> list[int]:
    """Keep as few documents, evenly spaced, as give `limit` tokens and about 256 each; the others count 0."""
    count = len(available)
    wanted = max(min(_FEWEST_DOCUMENTS, count), limit // _DOCUMENT_TOKENS)
    while wanted < count:
        chosen = {i * count // wanted for i in range(wanted)}
        kept = [n if i in chosen else 0 for i, n in enumerate(available)]
        if sum(kept) >= limit:
            return kept
        wanted += 1
    return available
