"""Choose the next token: greedy, or by temperature, top-k, top-p and min-p, as Hugging Face does.

repetition penalty -> temperature -> top-k -> top-p -> min-p. Every request draws from a generator of its own,
so its text does not depend on what else is in the batch.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from .completion import TokenLogprob
from .errors import RequestError
from .session import Scores

MAX_LOGPROBS = 100
_FROM_GENERATION_CONFIG = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class SamplingParams:
    """How one request is to be generated. The default is greedy.

    Attributes:
        max_new_tokens: The most tokens to generate; the end of the context ends it too.
        temperature: 0 is greedy (the other sampling options are then without effect).
        top_k: Only the k most likely tokens; 0 or -1 for all.
        top_p: Only the smallest set of most likely tokens whose probability reaches p.
        min_p: Only tokens at least this fraction as likely as the most likely one.
        repetition_penalty: Above 1 makes tokens of the prompt and of the text so far less likely, also when
            greedy.
        seed: Makes sampling repeatable; None draws a new one.
        stop: Strings that end generation, also across token borders. A single string is taken as one.
        stop_token_ids: More ids that end generation, besides the model's own end tokens.
        include_stop: Keep the stop string in the text.
        ignore_eos: Go on after the model's own end tokens.
        skip_special_tokens: Leave special tokens out of the text.
        logprobs: Return log probabilities, with this many of the most likely tokens each.

    Raises:
        RequestError: A value is out of range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: Optional[int] = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: Optional[int] = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _check_integer("max_new_tokens", self.max_new_tokens, 1)
        _check_integer("top_k", self.top_k, -1)
        _check_number("temperature", self.temperature, 0.0, 1e4)
        _check_number("top_p", self.top_p, 0.0, 1.0, low_is_allowed=False)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_number("repetition_penalty", self.repetition_penalty, 0.0, 1e4, low_is_allowed=False)
        if self.seed is not None:
            _check_integer("seed", self.seed, 0)
        if self.logprobs is not None:
            _check_integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        for stop in self.stop:
            if not isinstance(stop, str) or not stop:
                raise RequestError(f"stop: non-empty strings are wanted, got {stop!r}")
        for token_id in self.stop_token_ids:
            _check_integer("stop_token_ids", token_id, 0)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0 or self.top_k == 1

    @classmethod
    def from_generation_config(
        cls, config: Mapping[str, Any], where: str = "generation_config.json", **options: Any
    ) -> "SamplingParams":
        """Return sampling as the model's makers advise it (generation_config.json); `options` win.

        Where the file says nothing, Hugging Face's defaults hold: temperature 1, top_k 50, top_p 1.

        Raises:
            RequestError: A value out of range; `where` names the file if it comes from there.
        """
        values: Dict[str, Any] = {"temperature": 1.0, "top_k": 50}
        for name in _FROM_GENERATION_CONFIG:
            if config.get(name) is not None and name not in options:
                values[name] = config[name]
        try:
            cls(**values)
        except RequestError as error:
            cure = "give a value of your own, or export the model again with this file corrected"
            raise RequestError(f"{where}: {error}; {cure}") from None
        values.update(options)
        return cls(**values)

    def with_options(self, **options: Any) -> "SamplingParams":
        """Return a copy with some fields changed.

        Raises:
            RequestError: An unknown field, or a value out of range.
        """
        unknown = sorted(set(options) - {f.name for f in fields(self)})
        if unknown:
            raise RequestError(f"unknown sampling option '{unknown[0]}'; there are: {', '.join(_names())}")
        return replace(self, **options)


class Choice(NamedTuple):
    """A chosen token, or why none could be chosen."""

    token_id: int
    logprob: Optional[TokenLogprob] = None
    error: Optional[str] = None


class Sampler:
    """The sampling state of one request.

    Args:
        params: How to choose.
        prompt_ids: The repetition penalty counts the prompt too.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        self.params = params
        self.is_plain = params.is_greedy and params.repetition_penalty == 1.0 and params.logprobs is None
        self._generator = None if params.is_greedy else np.random.Generator(np.random.PCG64(params.seed))
        self._seen = {int(token_id) for token_id in prompt_ids} if params.repetition_penalty != 1.0 else set()

    def choose(self, row: np.ndarray, ids: Optional[np.ndarray] = None) -> Choice:
        """Return the next token of scores float32 [C] (column c is token ids[c], or c)."""
        scores = self._penalized(row, ids)
        best = int(scores.argmax())
        if not math.isfinite(scores[best]):
            return Choice(-1, error=_broken(float(scores[best])))
        column = best if self._generator is None else self._draw(scores, float(scores[best]))
        token_id = column if ids is None else int(ids[column])
        if self.params.repetition_penalty != 1.0:
            self._seen.add(token_id)
        return Choice(token_id, self._logprob(row, ids, column, token_id))

    def _penalized(self, row: np.ndarray, ids: Optional[np.ndarray]) -> np.ndarray:
        penalty = self.params.repetition_penalty
        if penalty == 1.0 or not self._seen:
            return row
        seen = np.fromiter(self._seen, np.int64, len(self._seen))
        columns = seen[seen < row.shape[0]] if ids is None else np.flatnonzero(np.isin(ids, seen))
        scores = row.copy()
        met = scores[columns]
        scores[columns] = np.where(met < 0, met * np.float32(penalty), met / np.float32(penalty))
        return scores

    def _draw(self, scores: np.ndarray, best: float) -> int:
        assert self._generator is not None
        columns = _top_k(scores, self.params.top_k)
        weights = np.exp((scores[columns].astype(np.float64) - best) / self.params.temperature)
        columns, weights = _nucleus(columns, weights, self.params.top_p)
        kept = weights >= self.params.min_p * weights[0]
        columns, weights = columns[kept], weights[kept]
        cumulative = np.cumsum(weights)
        drawn = np.searchsorted(cumulative, self._generator.random() * cumulative[-1], side="right")
        return int(columns[min(int(drawn), len(columns) - 1)])

    def _logprob(
        self, row: np.ndarray, ids: Optional[np.ndarray], column: int, token_id: int
    ) -> Optional[TokenLogprob]:
        count = self.params.logprobs
        if count is None:
            return None
        scores = row.astype(np.float64)
        scores -= scores.max()
        scores -= math.log(np.exp(scores).sum())
        best = np.argsort(-scores, kind="stable")[:count] if count else np.zeros(0, np.int64)
        top = tuple((int(c if ids is None else ids[c]), float(scores[c])) for c in best)
        return TokenLogprob(token_id, float(scores[column]), top)


def choose_tokens(scores: Scores, samplers: Sequence[Sampler]) -> List[Choice]:
    """Return the next token of every row; one vectorised pass when all rows are plain greedy."""
    if all(sampler.is_plain for sampler in samplers):
        return [_greedy(scores, row, column) for row, column in enumerate(scores.values.argmax(axis=1).tolist())]
    if scores.values.shape[1] == 1:
        message = "this graph returns only the most likely token; generate greedily, without logprobs"
        return [Choice(-1, error=message) for _ in samplers]
    if scores.ids is None:
        return [sampler.choose(row) for sampler, row in zip(samplers, scores.values)]
    return [_among(sampler, row, ids) for sampler, row, ids in zip(samplers, scores.values, scores.ids)]


def _greedy(scores: Scores, row: int, column: int) -> Choice:
    value = float(scores.values[row, column])
    if not math.isfinite(value):
        return Choice(-1, error=_broken(value))
    return Choice(column if scores.ids is None else int(scores.ids[row, column]))


def _among(sampler: Sampler, row: np.ndarray, ids: np.ndarray) -> Choice:
    """Choose among the candidates a graph returned; what needs the scores of all tokens cannot be had from them."""
    if sampler.params.logprobs is not None:
        message = f"logprobs need the scores of all tokens, this graph returns its best {len(ids)}: compile with --keep-logits"
        return Choice(-1, error=message)
    return sampler.choose(row, ids)


def _top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Return the columns of the k best scores; equals of the k-th stay, as in Hugging Face."""
    if not 0 < k < scores.shape[0]:
        return np.arange(scores.shape[0])
    threshold = np.partition(scores, scores.shape[0] - k)[scores.shape[0] - k]
    return np.flatnonzero(scores >= threshold)


def _nucleus(columns: np.ndarray, weights: np.ndarray, top_p: float) -> Tuple[np.ndarray, np.ndarray]:
    """Return columns and weights, best first, of the smallest set whose probability reaches `top_p`."""
    total = weights.sum()
    if top_p < 1.0:
        # Tokens below (1 - p) / n hold less than 1 - p together: the set lies above, and only that is sorted.
        above = weights >= total * (1.0 - top_p) / len(weights)
        columns, weights = columns[above], weights[above]
    order = np.argsort(-weights, kind="stable")
    columns, weights = columns[order], weights[order]
    if top_p < 1.0:
        before = np.cumsum(weights) - weights
        kept = before < top_p * total
        kept[0] = True
        columns, weights = columns[kept], weights[kept]
    return columns, weights


def _names() -> List[str]:
    return [f.name for f in fields(SamplingParams)]


def _broken(value: float) -> str:
    return f"the model's scores are {value}: the graph overflows or is damaged; run `qcompile verify` on it"


def _check_integer(name: str, value: Any, low: int, high: Optional[int] = None) -> None:
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):
        span = f">= {low}" if high is None else f"{low} to {high}"
        raise RequestError(f"{name}: an integer {span} is wanted, got {value!r}")


def _check_number(name: str, value: Any, low: float, high: float, low_is_allowed: bool = True) -> None:
    is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or (value == low and not low_is_allowed):
        raise RequestError(f"{name}: a number from {low:g} to {high:g} is wanted, got {value!r}")
