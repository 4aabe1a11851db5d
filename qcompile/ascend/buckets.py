"""The shapes a model is compiled for: prefill graphs take a chunk of one prompt, decode graphs one token of each slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qcompile.errors import ShapeError

PREFILL, DECODE = "prefill", "decode"


@dataclass(frozen=True, order=True)
class Bucket:
    """One static graph.

    Attributes:
        role: ``prefill`` or ``decode``.
        batch: Slots B; 1 for prefill.
        query_len: Tokens of each slot per step S; 1 for decode.
        kv_len: Tokens of each slot the KV cache has room for, T.
    """

    role: str
    batch: int
    query_len: int
    kv_len: int

    @property
    def name(self) -> str:
        """The name of its files: decode_b4_t1024, prefill_s128_t1024."""
        return f"{self.role}_{f'b{self.batch}' if self.role == DECODE else f's{self.query_len}'}_t{self.kv_len}"


@dataclass(frozen=True)
class BucketOptions:
    """Which buckets to compile: every batch and every prefill length with every KV length."""

    batches: tuple[int, ...] = (1, 4)
    kv_lens: tuple[int, ...] = (1024,)
    prefill_lens: tuple[int, ...] = (128,)

    def buckets(self, max_position_embeddings: int) -> list[Bucket]:
        """Return the buckets, smallest first.

        Raises:
            ShapeError: A length is not positive, does not fit the model's positions, or a chunk not its cache.
        """
        for option, values in (("--batch", self.batches), ("--kv-len", self.kv_lens)):
            _check(option, values)
        _check("--prefill-len", self.prefill_lens)
        if max(self.kv_lens) > max_position_embeddings:
            raise ShapeError(
                f"--kv-len {max(self.kv_lens)}: the model has {max_position_embeddings} positions; give at most that"
            )
        if max(self.prefill_lens) > min(self.kv_lens):
            raise ShapeError(
                f"--prefill-len {max(self.prefill_lens)}: longer than the smallest KV cache, {min(self.kv_lens)} "
                "tokens; give a shorter chunk or a larger --kv-len"
            )
        prefill = [Bucket(PREFILL, 1, s, t) for t in self.kv_lens for s in self.prefill_lens]
        return sorted({*prefill, *(Bucket(DECODE, b, 1, t) for t in self.kv_lens for b in self.batches)})


def lengths(option: str, text: str) -> tuple[int, ...]:
    """Read `1,4,8`: positive whole numbers, each once, smallest first.

    Raises:
        ShapeError: It is not such a list.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise ShapeError(f"{option} {text!r}: whole numbers separated by commas are wanted, such as 1,4,8")
    values = tuple(sorted({int(word) for word in words}))
    _check(option, values)
    return values


def _check(option: str, values: Sequence[int]) -> None:
    if not values or min(values) < 1 or max(values) > 1 << 20:
        raise ShapeError(f"{option} {','.join(map(str, values))}: numbers from 1 to {1 << 20} are wanted")
