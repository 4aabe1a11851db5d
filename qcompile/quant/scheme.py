"""What a quantized weight is: the scheme, the codes and scales, and what is known about a Linear's inputs.

Letters: N output channels, K input features, g elements per group, G = ceil(K / g) groups of a row. A weight here is
always [N, K], one output channel per row, as Hugging Face stores it (the transpose of an ONNX MatMul's weight).

    symmetric     w' = scale * q                  q int8:  [-127, 127] of 8 bits, [-8, 7] of 4 bits
    asymmetric    w' = scale * (q - zero_point)   q uint8: [0, 255] of 8 bits, [0, 15] of 4 bits

(Jacob et al. 2018, eq. 1.) A group size that does not divide K gives a short last group: a kernel that wants whole
groups pads the codes with the zero point (0 where symmetric), which changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qcompile.errors import QuantError

FloatArray = npt.NDArray[np.float32]
ScaleType = Literal["float32", "float16", "bfloat16"]
_SCALE_TYPES: dict[str, npt.DTypeLike] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


@dataclass(frozen=True)
class WeightScheme:
    """How a weight is stored.

    Attributes:
        bits: 4 or 8.
        group_size: Elements of a row that share a scale; None for one scale per output channel.
        symmetric: Whether zero is code 0; otherwise every group has a zero point.
        scale_type: Type the scales will be stored in. They are rounded to it before the codes are chosen.

    Raises:
        QuantError: A value is out of range.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = True
    scale_type: ScaleType = "float32"

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise QuantError(f"weights of {self.bits} bits are not supported; 4 or 8 are")
        if self.group_size is not None and self.group_size < 1:
            raise QuantError(f"a group size of {self.group_size} makes no sense; give a positive number, or none")
        if self.scale_type not in _SCALE_TYPES:
            raise QuantError(f"scales of type '{self.scale_type}' are not supported; {', '.join(_SCALE_TYPES)} are")

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        if not self.symmetric:
            return 0, (1 << self.bits) - 1
        return (-8, 7) if self.bits == 4 else (-127, 127)

    @property
    def code_type(self) -> npt.DTypeLike:
        """NumPy type of a code: one code per element, whatever its bits."""
        return np.int8 if self.symmetric else np.uint8

    def group_of(self, num_inputs: int) -> int:
        """Return g for rows of K elements: the group size, or K."""
        return num_inputs if self.group_size is None else min(self.group_size, num_inputs)

    def num_groups(self, num_inputs: int) -> int:
        """Return G for rows of K elements."""
        return -(-num_inputs // self.group_of(num_inputs))

    def size_bytes(self, num_outputs: int, num_inputs: int) -> int:
        """Return the bytes of packed codes, scales and zero points of a weight [N, K], groups padded to whole ones."""
        groups = self.num_groups(num_inputs)
        codes = groups * self.group_of(num_inputs) * self.bits
        zero_points = 0 if self.symmetric else groups * self.bits
        row = -(-codes // 8) + groups * np.dtype(_SCALE_TYPES[self.scale_type]).itemsize + -(-zero_points // 8)
        return num_outputs * row

    def stored_scales(self, scales: FloatArray) -> FloatArray:
        """Round scales to the stored type; the 0 of a group of zeros becomes 1.

        Half precision has subnormal numbers: 8-bit codes of weights below 0.0077 need them. Where less than four bits of
        one are left, a scale is rounded up, as a smaller one would clip. Those of the wide types are of no use to anybody,
        and slow: they become 1 too, and all codes 0.
        """
        dtype = np.dtype(_SCALE_TYPES[self.scale_type])
        smallest, largest = self._scale_range
        limited = np.clip(scales, -largest, largest)
        is_small = np.abs(limited) < smallest
        if self.scale_type == "float16" and is_small.any():
            step = np.float32(ml_dtypes.finfo(dtype).smallest_subnormal)
            limited = np.where(is_small, np.copysign(np.ceil(np.abs(limited) / step) * step, limited), limited)
            is_small = limited == 0
        kept = np.where(is_small, np.float32(1), limited).astype(dtype)
        return np.asarray(kept.astype(np.float32))

    def holds(self, scales: FloatArray) -> bool:
        """Whether the stored type has numbers for scales [N, G], with four bits at least."""
        smallest, largest = self._scale_range
        magnitude = np.abs(scales)
        return not bool((((magnitude < smallest) & (magnitude > 0)) | (magnitude > largest)).any())

    @property
    def _scale_range(self) -> tuple[float, float]:
        """Smallest scale with four bits at least (all bits in the wide types), and largest."""
        info = ml_dtypes.finfo(_SCALE_TYPES[self.scale_type])
        return float(16 * info.smallest_subnormal if self.scale_type == "float16" else info.tiny), float(info.max)

    def describe(self) -> str:
        """Return a short name: int4 asymmetric, groups of 32."""
        kind = "symmetric" if self.symmetric else "asymmetric"
        groups = "per channel" if self.group_size is None else f"groups of {self.group_size}"
        return f"int{self.bits} {kind}, {groups}"


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight in codes.

    Attributes:
        codes: int8 (symmetric) or uint8 (asymmetric) [N, K], one code per element; packing is the lowering's job.
        scales: float32 [N, G], values of the scheme's scale type. Never 0.
        zero_points: uint8 [N, G], or None where symmetric.
        scheme: How to read them.
    """

    codes: npt.NDArray[np.int8] | npt.NDArray[np.uint8]
    scales: FloatArray
    zero_points: npt.NDArray[np.uint8] | None
    scheme: WeightScheme

    def dequantize(self) -> FloatArray:
        """Return float32 [N, K]: what the codes stand for."""
        num_inputs = self.codes.shape[1]
        group = self.scheme.group_of(num_inputs)
        values = self.codes.astype(np.float32)
        if self.zero_points is not None:
            values -= _spread(self.zero_points.astype(np.float32), group, num_inputs)
        values *= _spread(self.scales, group, num_inputs)
        return values

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """Return output channels [start, stop)."""
        zero_points = None if self.zero_points is None else self.zero_points[start:stop]
        return QuantizedWeight(self.codes[start:stop], self.scales[start:stop], zero_points, self.scheme)


@dataclass
class InputStatistics:
    """What is known about the inputs x [.., K] of one Linear (or of several Linears that read the same x).

    Attributes:
        count: Tokens seen.
        abs_max: float32 [K], max |x_k|.
        abs_mean: float32 [K], mean |x_k|.
        hessian: float32 [K, K], sum of x x^T over the tokens; None if it was not gathered.
        sample: float32 [R, K], some of the tokens, those with the largest entries among them; None if not gathered.
    """

    count: int
    abs_max: FloatArray
    abs_mean: FloatArray
    hessian: FloatArray | None = None
    sample: FloatArray | None = None

    @property
    def num_inputs(self) -> int:
        """K."""
        return int(self.abs_max.shape[0])

    def scaled(self, divisor: FloatArray) -> InputStatistics:
        """Return the statistics of x / divisor, for a scale [K] that was folded into the operation before."""
        inverse = (1.0 / divisor.astype(np.float64)).astype(np.float32)
        return InputStatistics(
            self.count,
            self.abs_max * np.abs(inverse),
            self.abs_mean * np.abs(inverse),
            None if self.hessian is None else self.hessian * inverse[:, None] * inverse[None, :],
            None if self.sample is None else self.sample * inverse,
        )


@dataclass(frozen=True)
class AlgorithmOptions:
    """What an algorithm can be told; those that do not know an option ignore it.

    Attributes:
        damping: GPTQ: share of the Hessian's mean diagonal that is added to it.
        act_order: GPTQ: round the inputs with the largest Hessian diagonal first.
        block_size: GPTQ: columns rounded between two matrix products.
        sweeps: GPTQ: times that codes and scales are gone through again afterwards.
        num_steps: MSE and clipping searches: candidates for each scale.
        smallest_ratio: The same searches: smallest scale tried, as a share of the one that covers every value.
        exponent: MSE search: the error counted is |w - w'| to this power.
    """

    damping: float = 0.01
    act_order: bool = True
    block_size: int = 128
    sweeps: int = 2
    num_steps: int = 5
    smallest_ratio: float = 0.8
    exponent: float = 2.0


DEFAULT_OPTIONS = AlgorithmOptions()
Quantizer = Callable[[FloatArray], QuantizedWeight]


def check_weight(weight: npt.NDArray[np.floating], name: str = "weight") -> FloatArray:
    """Return a weight as float32 [N, K].

    Raises:
        QuantError: It is not a matrix, has no elements, or has a NaN or infinite value (the first one is named).
    """
    if weight.ndim != 2 or 0 in weight.shape:
        raise QuantError(f"{name}: shape {list(weight.shape)}, a weight is a matrix [outputs, inputs] with elements")
    with np.errstate(over="ignore"):
        values = np.asarray(weight, dtype=np.float32)
    largest = np.maximum(np.abs(values.max(axis=1)), np.abs(values.min(axis=1)))
    if not np.isfinite(largest).all():
        row = int(np.argmin(np.isfinite(largest)))
        column = int(np.argmin(np.isfinite(values[row])))
        raise QuantError(
            f"{name}: row {row} has NaN or infinite weights (input {column} is {weight[row, column]}); they cannot be "
            f"quantized: repair the checkpoint or keep the layer float, --keep-float '{name}'"
        )
    return values


def _spread(per_group: FloatArray, group: int, num_inputs: int) -> FloatArray:
    """Return [N, K] from [N, G]."""
    if per_group.shape[1] == 1:
        return np.broadcast_to(per_group, (per_group.shape[0], num_inputs))
    return np.repeat(per_group, group, axis=1)[:, :num_inputs]
