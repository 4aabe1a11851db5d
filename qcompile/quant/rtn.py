"""Round to nearest: the scale of a group is the smallest that covers every value.

    symmetric     scale = max|w| / q_max                       q = round(w / scale)
    asymmetric    scale = (max(w, 0) - min(w, 0)) / (2^b - 1)  zero_point = round(-min(w, 0) / scale)
                                                               q = round(w / scale) + zero_point

(Jacob et al. 2018, eq. 1 and 2.) So |w - w'| <= scale / 2, and one step where the rounded zero point cuts the range. A
group of zeros, or of numbers too small for any scale, gets scale 1 and the codes of zero: a scale of 0 would
divide to NaN.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qcompile.quant.scheme import FloatArray, QuantizedWeight, WeightScheme

GroupScales = tuple[FloatArray, npt.NDArray[np.uint8] | None]


def round_to_nearest(weight: FloatArray, scheme: WeightScheme) -> QuantizedWeight:
    """Quantize a checked weight [N, K]."""
    groups = grouped(weight, scheme)
    return encode(groups, *covering_scales(groups, scheme), scheme, weight.shape[1])


def grouped(weight: FloatArray, scheme: WeightScheme) -> FloatArray:
    """Return [N, G, g]: a weight cut into groups, the last one filled up with zeros."""
    rows, num_inputs = weight.shape
    group, count = scheme.group_of(num_inputs), scheme.num_groups(num_inputs)
    missing = group * count - num_inputs
    padded = np.pad(weight, ((0, 0), (0, missing))) if missing else weight
    return padded.reshape(rows, count, group)


def covering_scales(groups: FloatArray, scheme: WeightScheme) -> GroupScales:
    """Return scales float32 [N, G] and zero points uint8 [N, G] (or None) that cover every value of [N, G, g]."""
    high, low = groups.max(axis=2), groups.min(axis=2)
    if scheme.symmetric:
        return scheme.stored_scales(np.maximum(high, -low) / np.float32(scheme.code_range[1])), None
    return scales_of_range(np.minimum(low, 0), np.maximum(high, 0), scheme)


def scales_of_range(low: FloatArray, high: FloatArray, scheme: WeightScheme) -> GroupScales:
    """Return asymmetric scales and zero points for ranges low <= 0 <= high."""
    steps = np.float32(scheme.code_range[1])
    scales = scheme.stored_scales(high / steps - low / steps)
    with np.errstate(over="ignore"):
        zero_points = np.clip(np.rint(-low / scales), 0, steps).astype(np.uint8)
    return scales, zero_points


def encode(
    groups: FloatArray,
    scales: FloatArray,
    zero_points: npt.NDArray[np.uint8] | None,
    scheme: WeightScheme,
    num_inputs: int,
) -> QuantizedWeight:
    """Return the nearest codes of [N, G, g] for given scales."""
    codes = nearest_codes(groups, scales[:, :, None], None if zero_points is None else zero_points[:, :, None], scheme)
    flat = codes.reshape(len(groups), -1)[:, :num_inputs].astype(scheme.code_type)
    return QuantizedWeight(flat, scales, zero_points, scheme)


def nearest_codes(
    values: FloatArray, scales: FloatArray, zero_points: npt.NDArray[np.uint8] | None, scheme: WeightScheme
) -> FloatArray:
    """Return the nearest codes as floats; scales and zero points broadcast against the values."""
    codes = values / scales
    np.rint(codes, out=codes)
    if zero_points is not None:
        codes += zero_points
    lowest, highest = scheme.code_range
    np.maximum(codes, lowest, out=codes)  # numpy's clip takes longer than both for the short rows of GPTQ
    np.minimum(codes, highest, out=codes)
    return codes
