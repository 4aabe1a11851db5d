"""Orthogonal matrices that spread one strong channel over all: Hadamard where one is known, else with a random block.

    Q = diag(signs) (S_{2^a} (x) B_m) / sqrt(2^a),     K = 2^a m,   S Sylvester's matrix, B orthogonal [m, m]

B is Paley's Hadamard matrix divided by sqrt(m) when one of order m is known (Paley 1933: q + 1 for a prime q = 3 mod 4,
2 (q + 1) for a prime q = 1 mod 4), so all entries of Q have the same size; for what is left, a random orthogonal matrix.
The widths of Qwen2.5 and Qwen3 from 0.5B to 72B are all Hadamard but one: 896 = 32 * 28, 4864 = 64 * 76, 1536 = 128 * 12,
8960 = 64 * 140, 18944 = 128 * 148, ...; 11008 (3B) = 256 * 43 takes a random block.
The random signs keep a channel that is alike in all tokens from landing on one column.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcompile.errors import QuantError
from qcompile.quant.scheme import FloatArray

_MAX_BLOCK = 1024


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix Q [K, K], applied without being written out.

    Attributes:
        signs: float32 [K], 1 or -1.
        block: float32 [m, m], orthogonal.
        power: a; K = 2^a m.
    """

    signs: FloatArray
    block: FloatArray
    power: int

    @property
    def size(self) -> int:
        """K."""
        return len(self.signs)

    def apply(self, x: npt.NDArray[np.floating]) -> FloatArray:
        """Return x Q for x [..., K]: K (a + m) multiply-adds per row instead of K^2."""
        return self._spread(self._checked(x) * self.signs, self.block)

    def undo(self, x: npt.NDArray[np.floating]) -> FloatArray:
        """Return x Q^T for x [..., K]."""
        return np.asarray(self._spread(self._checked(x), self.block.T) * self.signs)

    def matrix(self) -> FloatArray:
        """Return Q [K, K]."""
        return self.apply(np.eye(self.size, dtype=np.float32))

    def _checked(self, x: npt.NDArray[np.floating]) -> FloatArray:
        if x.shape[-1:] != (self.size,):
            raise QuantError(f"a rotation of {self.size} channels cannot be applied to {list(x.shape)}")
        return np.asarray(x, dtype=np.float32)

    def _spread(self, x: FloatArray, block: FloatArray) -> FloatArray:
        """Return x (S (x) block) / sqrt(2^a); S is its own transpose."""
        shape = x.shape
        parts = x.reshape(-1, 1 << self.power, len(block)) @ block
        for level in range(self.power):
            pairs = parts.reshape(-1, 2, 1 << level, len(block))
            parts = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1)
        return np.asarray(parts.reshape(shape) * np.float32(1 / math.sqrt(1 << self.power)))


def hadamard_rotation(size: int, seed: int = 0) -> Rotation:
    """Return a random rotation of K channels.

    Raises:
        QuantError: K has a factor for which no Hadamard matrix is known and that is too large for a random one.
    """
    if size < 1:
        raise QuantError(f"a rotation of {size} channels makes no sense")
    rng = np.random.default_rng(seed)
    signs = rng.choice(np.array([-1, 1], dtype=np.float32), size)
    twos = (size & -size).bit_length() - 1
    odd = size >> twos
    if odd == 1:
        return Rotation(signs, np.ones((1, 1), np.float32), twos)
    for exponent in range(2, twos + 1):
        order = odd << exponent
        if order <= _MAX_BLOCK and has_paley(order):
            block = paley(order).astype(np.float32) / np.float32(math.sqrt(order))
            return Rotation(signs, block, twos - exponent)
    if odd > _MAX_BLOCK:
        raise QuantError(f"{size} channels = {odd} * {1 << twos}: no Hadamard matrix is known here for that")
    return Rotation(signs, random_orthogonal(odd, rng), twos)


def has_paley(order: int) -> bool:
    """Whether Paley's construction over a prime gives a Hadamard matrix of this order."""
    return _first_kind(order) or _second_kind(order)


def paley(order: int) -> npt.NDArray[np.int8]:
    """Return a Hadamard matrix: entries 1 and -1, H H^T = order * I.

    Raises:
        QuantError: Paley's construction over a prime does not give this order.
    """
    if _first_kind(order):
        core = _jacobsthal(order - 1)
        skew = np.zeros((order, order), dtype=np.int8)
        skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, core
        return np.asarray(skew + np.eye(order, dtype=np.int8))
    if _second_kind(order):
        half = order // 2
        conference = np.zeros((half, half), dtype=np.int8)
        conference[0, 1:], conference[1:, 0], conference[1:, 1:] = 1, 1, _jacobsthal(half - 1)
        off = np.array([[1, 1], [1, -1]], dtype=np.int8)
        own = np.array([[1, -1], [-1, -1]], dtype=np.int8)
        return np.asarray(np.kron(conference, off) + np.kron(np.eye(half, dtype=np.int8), own), dtype=np.int8)
    raise QuantError(f"no Paley matrix of order {order}")


def random_orthogonal(size: int, rng: np.random.Generator) -> FloatArray:
    """Return an orthogonal matrix [m, m], uniformly distributed (Mezzadri 2007)."""
    q, r = np.linalg.qr(rng.standard_normal((size, size)))
    return np.asarray(q * np.sign(np.diagonal(r)), dtype=np.float32)


def _jacobsthal(prime: int) -> npt.NDArray[np.int8]:
    """Return [q, q] with entry (i, j) the Legendre symbol of i - j."""
    symbols = np.full(prime, -1, dtype=np.int8)
    symbols[np.arange(1, prime, dtype=np.int64) ** 2 % prime] = 1
    symbols[0] = 0
    numbers = np.arange(prime)
    return np.asarray(symbols[(numbers[:, None] - numbers[None, :]) % prime])


def _first_kind(order: int) -> bool:
    return order % 4 == 0 and _is_prime(order - 1)


def _second_kind(order: int) -> bool:
    return order % 4 == 0 and (order // 2 - 1) % 4 == 1 and _is_prime(order // 2 - 1)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
