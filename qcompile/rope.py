"""Rotary position embedding: the frequencies each rope type means.

    default   theta^(-2i/d)
    linear    theta^(-2i/d) / factor
    dynamic   NTK: theta grows with the longest position seen; computed in the graph
    yarn      per frequency between theta^(-2i/d) and that over factor; cos and sin times attention_factor

Source: Su et al. 2021 (RoPE); Peng et al. 2023, eq. 17-23 (YaRN); semantics of every key as in transformers'
modeling_rope_utils.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.errors import ExportError

# well within float32, which the graph computes in
_MAX_NUMBER = 1e30
ROPE_TYPES = ("default", "linear", "dynamic", "yarn")

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class RopeParameters:
    """One rope parameter set; None means the key is absent and transformers' default applies."""

    rope_type: str
    rope_theta: float
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any], max_positions: int, where: str) -> "RopeParameters":
        """Read either spelling: `rope_theta` with `rope_scaling`, or `rope_parameters`.

        Raises:
            ExportError: A rope type or key that is not supported, missing or wrong.
        """
        key, rope = _rope_dict(config, where)
        values = _Values(rope, f"{where}: '{key}'")
        rope_type = _supported_type(config, rope, key, where)
        theta = _theta(config, rope, where)
        if rope_type == "default":
            return cls("default", theta)
        original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        original = _length(original or max_positions, f"{where}: 'original_max_position_embeddings'")
        parameters = cls(
            rope_type=rope_type,
            rope_theta=theta,
            factor=values.optional("factor", zero=False),
            original_max_position_embeddings=original,
            attention_factor=values.optional("attention_factor"),
            beta_fast=values.optional("beta_fast"),
            beta_slow=values.optional("beta_slow"),
            mscale=values.optional("mscale"),
            mscale_all_dim=values.optional("mscale_all_dim"),
            truncate=values.flag("truncate", default=True),
        )
        return parameters._with_factor(max_positions, f"{where}: '{key}'")

    def _with_factor(self, max_positions: int, where: str) -> "RopeParameters":
        if self.factor is not None:
            return self
        if self.rope_type != "yarn" or self.original_max_position_embeddings is None:
            raise ExportError(f"{where} has no key 'factor', which rope type {self.rope_type} needs")
        return RopeParameters(**{**self.__dict__, "factor": max_positions / self.original_max_position_embeddings})

    def to_dict(self) -> dict[str, Any]:
        """Return the `rope_parameters` spelling, absent keys left out."""
        record = {key: value for key, value in self.__dict__.items() if value is not None}
        if self.rope_type != "yarn":
            record.pop("truncate")
        return record

    def inv_freq(self, head_dim: int) -> FloatArray:
        """Return the inverse frequencies [d/2] float32; for dynamic, those of short sequences."""
        if self.rope_type == "yarn":
            return _yarn_inv_freq(self, head_dim)
        inv_freq = np.float32(1.0) / _position_frequencies(self.rope_theta, head_dim)
        if self.rope_type == "linear":
            assert self.factor is not None
            inv_freq = inv_freq / np.float32(self.factor)
        return inv_freq

    def attention_scaling(self) -> float:
        """Return what cos and sin are multiplied by (1 except for yarn)."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        assert self.factor is not None
        if self.mscale and self.mscale_all_dim:
            return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)
        return _mscale(self.factor, 1.0)


def _rope_dict(config: Mapping[str, Any], where: str) -> tuple[str, Mapping[str, Any]]:
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key)
        if rope:
            if not isinstance(rope, Mapping):
                raise ExportError(f"{where}: '{key}' is {rope!r}; an object is expected")
            # newer configs may keep one set per layer type
            nested = rope.get("full_attention")
            return key, nested if isinstance(nested, Mapping) else rope
    return "rope_parameters", {}


def _supported_type(config: Mapping[str, Any], rope: Mapping[str, Any], key: str, where: str) -> str:
    rope_type = rope.get("rope_type", rope.get("type")) or "default"
    if rope_type not in ROPE_TYPES:
        raise ExportError(f"{where}: rope type {rope_type!r} is not supported; one of {', '.join(ROPE_TYPES)} is")
    if rope.get("mrope_section"):
        raise ExportError(f"{where}: '{key}' has mrope_section (multimodal rope), which is not supported")
    for holder in (rope, config):
        if (holder.get("partial_rotary_factor") or 1) != 1:
            raise ExportError(f"{where}: partial_rotary_factor is not 1; partial rotary embedding is not supported")
    return str(rope_type)


def _theta(config: Mapping[str, Any], rope: Mapping[str, Any], where: str) -> float:
    theta = rope.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        raise ExportError(f"{where}: key 'rope_theta' is missing (also from 'rope_parameters')")
    theta = _positive(theta, f"{where}: 'rope_theta'")
    if theta <= 1:
        raise ExportError(f"{where}: 'rope_theta' is {theta}; a number above 1 is expected")
    return theta


class _Values:
    def __init__(self, rope: Mapping[str, Any], where: str) -> None:
        self.rope, self.where = rope, where

    def optional(self, key: str, *, zero: bool = True) -> float | None:
        value = self.rope.get(key)
        return None if value is None else _positive(value, f"{self.where}: '{key}'", zero=zero)

    def flag(self, key: str, *, default: bool) -> bool:
        value = self.rope.get(key, default)
        # null is false, as in transformers
        if value is not None and not isinstance(value, bool):
            raise ExportError(f"{self.where}: '{key}' is {value!r}; true or false is expected")
        return bool(value)


def _length(value: Any, where: str) -> int:
    number = _positive(value, where)
    if not number.is_integer():
        raise ExportError(f"{where} is {value!r}; an integer of at least 1 is expected")
    return int(number)


def _positive(value: Any, where: str, *, zero: bool = False) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _MAX_NUMBER
    if not is_number or value < 0 or (value == 0 and not zero):
        raise ExportError(f"{where} is {value!r}; a positive number is expected")
    return float(value)


def _position_frequencies(base: float, head_dim: int) -> FloatArray:
    """Return base^(2i/d) [d/2], rounded to float32 once, as torch's float32 pow gives (± 1 ulp)."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.power(base, exponents.astype(np.float64)).astype(np.float32)


def _mscale(scale: float, mscale: float) -> float:
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0


def _yarn_inv_freq(rope: RopeParameters, head_dim: int) -> FloatArray:
    assert rope.factor is not None
    assert rope.original_max_position_embeddings is not None
    frequencies = _position_frequencies(rope.rope_theta, head_dim)
    extrapolation = np.float32(1.0) / frequencies
    interpolation = np.float32(1.0) / (np.float32(rope.factor) * frequencies)
    low, high = _correction_range(rope, head_dim)
    if low == high:
        high += 0.001
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    keep = np.float32(1.0) - np.clip(ramp, 0, 1)
    inv_freq: FloatArray = interpolation * (np.float32(1.0) - keep) + extrapolation * keep
    return inv_freq


def _correction_range(rope: RopeParameters, head_dim: int) -> tuple[float, float]:
    """Return the dimensions between which frequencies go from extrapolated to interpolated."""
    length = float(rope.original_max_position_embeddings or 0)

    def correction_dim(rotations: float) -> float:
        return head_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = correction_dim(rope.beta_fast or 32), correction_dim(rope.beta_slow or 1)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, head_dim - 1)
