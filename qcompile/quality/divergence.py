"""What two models say about the same tokens, row by row: log probabilities, KL and agreement. NumPy in and out.

Letters: S positions, V vocabulary. Sums over the vocabulary are taken in float64, a few rows at a time.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qcompile.errors import QualityError

Floats = npt.NDArray[np.float64]
_ROWS = 8  # rows of 152k float64 logits that stay within a cache of some 10 MB


@dataclass(frozen=True)
class TokenScores:
    """One entry per scored token, in the order of the text.

    Attributes:
        reference_nll: float64 [N], minus log p of the token under the reference, in nats.
        other_nll: The same under the other model.
        kl: float64 [N], KL(reference || other) of the whole distribution at that place, in nats.
        same_top: bool [N], both models put the same token first.
    """

    reference_nll: Floats
    other_nll: Floats
    kl: Floats
    same_top: npt.NDArray[np.bool_]

    @classmethod
    def joined(cls, parts: list[TokenScores]) -> TokenScores:
        """Return several as one."""
        return cls(
            np.concatenate([p.reference_nll for p in parts]),
            np.concatenate([p.other_nll for p in parts]),
            np.concatenate([p.kl for p in parts]),
            np.concatenate([p.same_top for p in parts]),
        )

    def __len__(self) -> int:
        return len(self.kl)


@dataclass(frozen=True)
class Summary:
    """The figures of one text, or of all.

    Attributes:
        num_tokens: Tokens scored.
        reference_perplexity: exp(mean nll) of the reference.
        other_perplexity: The same of the other model.
        mean_kl: Mean KL(reference || other) per token, nats.
        kl_standard_error: Standard error of that mean, tokens taken as independent.
        median_kl: Median.
        p99_kl: 99th percentile (linear interpolation).
        max_kl: Largest.
        top1_agreement: Share of tokens where both put the same token first.
    """

    num_tokens: int
    reference_perplexity: float
    other_perplexity: float
    mean_kl: float
    kl_standard_error: float
    median_kl: float
    p99_kl: float
    max_kl: float
    top1_agreement: float

    @classmethod
    def of(cls, scores: TokenScores) -> Summary:
        """Compute them from at least one token."""
        n = len(scores)
        with np.errstate(over="ignore"):
            perplexities = [float(np.exp(nll.mean())) for nll in (scores.reference_nll, scores.other_nll)]
        return cls(
            num_tokens=n,
            reference_perplexity=perplexities[0],
            other_perplexity=perplexities[1],
            mean_kl=float(scores.kl.mean()),
            kl_standard_error=float(scores.kl.std(ddof=1) / np.sqrt(n)) if n > 1 else 0.0,
            median_kl=float(np.median(scores.kl)),
            p99_kl=float(np.percentile(scores.kl, 99)),
            max_kl=float(scores.kl.max()),
            top1_agreement=float(scores.same_top.mean()),
        )


@dataclass
class RowScorer:
    """Scores rows of logits of two models against the tokens that really follow.

    Attributes:
        names: What the models are called in messages.
        threads: Threads that share the rows.
    """

    names: tuple[str, str]
    threads: int = 1
    _pool: ThreadPoolExecutor | None = field(default=None, repr=False)

    def score(
        self, reference: npt.NDArray[np.float32], other: npt.NDArray[np.float32], tokens: npt.NDArray[np.int64]
    ) -> TokenScores:
        """Score S rows.

        Args:
            reference: float32 [S, V].
            other: float32 [S, V].
            tokens: int64 [S], the token that follows each position.

        Raises:
            QualityError: A row holds NaN or +inf.
        """
        starts = range(0, len(tokens), _ROWS)
        rows = [slice(start, start + _ROWS) for start in starts]
        if self.threads < 2 or len(rows) < 2:
            parts = [self._block(reference[r], other[r], tokens[r]) for r in rows]
        else:
            self._pool = self._pool or ThreadPoolExecutor(self.threads, thread_name_prefix="kl")
            parts = list(self._pool.map(lambda r: self._block(reference[r], other[r], tokens[r]), rows))
        return TokenScores.joined(parts)

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _block(
        self, reference: npt.NDArray[np.float32], other: npt.NDArray[np.float32], tokens: npt.NDArray[np.int64]
    ) -> TokenScores:
        """Score a few rows at once.

        With p = softmax(a), q = softmax(b): KL(p || q) = sum p (a - b) - logsumexp(a) + logsumexp(b), which is
        exactly zero for equal rows.
        """
        a, b = reference.astype(np.float64), other.astype(np.float64)
        p, log_a = _softmax(a, self.names[0])
        _, log_b = _softmax(b, self.names[1])
        difference = np.subtract(a, b, where=p > 0, out=np.zeros_like(a))  # 0 log 0 = 0, also for logits of -inf
        kl = np.einsum("sv,sv->s", p, difference) - log_a + log_b
        index = np.arange(len(tokens))
        return TokenScores(
            log_a - a[index, tokens],
            log_b - b[index, tokens],
            np.maximum(kl, 0.0),
            reference.argmax(axis=1) == other.argmax(axis=1),
        )


def _softmax(logits: Floats, name: str) -> tuple[Floats, Floats]:
    """Return softmax [S, V] and log-sum-exp [S]."""
    highest = logits.max(axis=1)
    if not np.isfinite(highest).all():
        seen = highest[~np.isfinite(highest)][0]
        raise QualityError(
            f"{name}: its logits hold {seen}; the weights are damaged or the dtype overflows: "
            "look at them with `qcompile inspect`, or export with --dtype fp32"
        )
    weights = np.exp(logits - highest[:, None])
    total = weights.sum(axis=1)
    weights /= total[:, None]
    return weights, highest + np.log(total)
