"""Gather statistics of activations row by row: sums, maxima, second moments, and a sample of tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qcompile.calibration.second_moments import add_moments, mirror
from qcompile.errors import QuantError
from qcompile.quant.scheme import FloatArray, InputStatistics

_BUFFERED_TOKENS = 2048
_STRONGEST_SHARE = 8
# Calibration runs in float32, whatever the model's dtype, and the weights are finite.
_CURE = "look for huge weights in the layers before, or take a scheme that runs nothing, such as int8-weight"


@dataclass
class InputAccumulator:
    """The statistics of one activation [.., K].

    Attributes:
        name: What an error calls it.
        num_tokens: Tokens that will come in all, to space the sample evenly.
        wants_hessian: Whether to sum x x^T.
        num_sampled: Tokens to keep; an eighth of them are those with the largest entries.
    """

    name: str
    num_tokens: int
    wants_hessian: bool
    num_sampled: int
    _count: int = 0
    _abs_max: FloatArray | None = None
    _abs_sum: npt.NDArray[np.float64] | None = None
    _panels: FloatArray | None = None
    _buffer: list[FloatArray] = field(default_factory=list)
    _spaced: list[FloatArray] = field(default_factory=list)
    _strongest: FloatArray | None = None

    def add(self, x: npt.NDArray[np.floating]) -> None:
        """Take the activations of one row, [1, S, K] or [S, K].

        Raises:
            QuantError: One of them is NaN or infinite.
        """
        tokens = np.asarray(x, dtype=np.float32).reshape(-1, x.shape[-1])
        magnitude = np.abs(tokens)
        per_channel = magnitude.max(axis=0, initial=0)
        if not np.isfinite(per_channel).all():
            raise self._not_finite(tokens)
        if self._abs_max is None or self._abs_sum is None:
            self._abs_max = np.zeros(tokens.shape[1], np.float32)
            self._abs_sum = np.zeros(tokens.shape[1], np.float64)
        np.maximum(self._abs_max, per_channel, out=self._abs_max)
        self._abs_sum += magnitude.sum(axis=0, dtype=np.float64)
        self._sample(tokens, magnitude.max(axis=1, initial=0))
        self._count += len(tokens)
        if self.wants_hessian:
            self._buffer.append(tokens)
            if sum(map(len, self._buffer)) >= _BUFFERED_TOKENS:
                self._flush()

    def statistics(self) -> InputStatistics:
        """Return what was gathered.

        Raises:
            QuantError: Nothing was.
        """
        if self._abs_max is None or self._abs_sum is None or self._count == 0:
            raise QuantError(f"calibration: '{self.name}' saw no tokens")
        self._flush()
        sample = None
        if self.num_sampled:
            parts = [*self._spaced, *([] if self._strongest is None else [self._strongest])]
            sample = np.concatenate(parts) if parts else np.zeros((0, len(self._abs_max)), np.float32)
        mean = (self._abs_sum / self._count).astype(np.float32)
        hessian = None if self._panels is None else mirror(self._panels)
        return InputStatistics(self._count, self._abs_max, mean, hessian, sample)

    def _flush(self) -> None:
        """Add the buffered tokens to the Hessian: a product of many tokens is faster than many products."""
        if not self._buffer:
            return
        tokens = np.concatenate(self._buffer) if len(self._buffer) > 1 else self._buffer[0]
        self._buffer.clear()
        if self._panels is None:
            self._panels = np.zeros((tokens.shape[1], tokens.shape[1]), np.float32)
        add_moments(self._panels, tokens)

    def _sample(self, tokens: FloatArray, strength: FloatArray) -> None:
        """Keep evenly spaced tokens, and the strongest of all that came so far."""
        num_strongest = self.num_sampled // _STRONGEST_SHARE
        num_spaced = self.num_sampled - num_strongest
        if num_spaced:
            step = max(1, self.num_tokens // num_spaced)
            first = -self._count % step
            taken = sum(map(len, self._spaced))
            if taken < num_spaced:
                self._spaced.append(tokens[first::step][: num_spaced - taken].copy())
        if num_strongest:
            best = tokens[np.argsort(-strength, kind="stable")[:num_strongest]]
            both = best if self._strongest is None else np.concatenate([self._strongest, best])
            order = np.argsort(-np.abs(both).max(axis=1), kind="stable")[:num_strongest]
            self._strongest = both[order]

    def _not_finite(self, tokens: FloatArray) -> QuantError:
        token, channel = (int(i) for i in np.argwhere(~np.isfinite(tokens))[0])
        return QuantError(
            f"calibration: '{self.name}' has the value {tokens[token, channel]} (token {self._count + token}, channel "
            f"{channel}): the model overflows before it, in float32; {_CURE}"
        )


@dataclass
class KeyValueStatistics:
    """How large one layer's cached keys and values get.

    Attributes:
        key_abs_max: float32 [K, d], after the rotary embedding.
        value_abs_max: float32 [K, d].
        first_key_abs_max: The same of the first tokens of each row alone, which `key_abs_max` leaves out.
        first_value_abs_max: Likewise.
        num_first: How many tokens those are.
    """

    key_abs_max: FloatArray
    value_abs_max: FloatArray
    first_key_abs_max: FloatArray
    first_value_abs_max: FloatArray
    num_first: int

    @classmethod
    def empty(cls, kv_heads: int, head_dim: int, num_first: int) -> KeyValueStatistics:
        """Return statistics of no tokens."""
        zeros = [np.zeros((kv_heads, head_dim), np.float32) for _ in range(4)]
        return cls(zeros[0], zeros[1], zeros[2], zeros[3], num_first)

    def add(self, cached: npt.NDArray[np.floating], kind: str, name: str) -> None:
        """Take one row's keys or values [1, K, T, d].

        Args:
            cached: What the row's cache holds.
            kind: ``key`` or ``value``.
            name: What an error calls it.

        Raises:
            QuantError: One of them is NaN or infinite.
        """
        magnitude = np.abs(np.asarray(cached, dtype=np.float32)[0])
        if not np.isfinite(magnitude).all():
            raise QuantError(f"calibration: '{name}' has NaN or infinite values: the model overflows; {_CURE}")
        for part, prefix in ((magnitude[:, self.num_first :], ""), (magnitude[:, : self.num_first], "first_")):
            own: FloatArray = getattr(self, f"{prefix}{kind}_abs_max")
            np.maximum(own, part.max(axis=1, initial=0), out=own)
