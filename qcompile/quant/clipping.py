"""Clipping search: the range of a group that hurts the outputs least, given the inputs.

    scale* = argmin over r of  e_g(r) H_gg e_g(r)^T,   e_g(r) = w_g - w'_g(r * scale)

AWQ's second step (Lin et al. 2023, section 3.2 and `auto_clip` of its code): the same grid as the MSE search, but an
error counts by what it does to the group's share of the output, with H_gg the block [g, g] of the inputs' second moments.
Groups wider than 512 use the diagonal of H: a block as wide as the row would cost a matrix product per candidate.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from qcompile.quant.mse import candidates, num_threads, round_with_searched_scales
from qcompile.quant.rtn import encode, grouped, nearest_codes
from qcompile.quant.scheme import AlgorithmOptions, FloatArray, QuantizedWeight, WeightScheme

MAX_BLOCK = 512
_BLOCK_ELEMENTS = 1 << 20
# OpenBLAS computes products up to this size in one thread; larger ones of such small blocks wait more than they work.
_SERIAL_PRODUCT = 1 << 18


def clip(weight: FloatArray, scheme: WeightScheme, hessian: FloatArray, options: AlgorithmOptions) -> QuantizedWeight:
    """Quantize a checked weight [N, K] with scales searched against H [K, K]."""
    num_inputs = weight.shape[1]
    if scheme.group_of(num_inputs) > MAX_BLOCK:
        return round_with_searched_scales(weight, scheme, options, _diagonal(hessian))
    blocks = diagonal_blocks(hessian, scheme)
    step = max(1, min(_BLOCK_ELEMENTS // num_inputs, _SERIAL_PRODUCT // scheme.group_of(num_inputs) ** 2))

    def part(start: int) -> QuantizedWeight:
        return _clip_rows(weight[start : start + step], scheme, blocks, options)

    with ThreadPoolExecutor(num_threads()) as pool:
        parts = list(pool.map(part, range(0, len(weight), step)))
    zero_points = [p.zero_points for p in parts if p.zero_points is not None]
    return QuantizedWeight(
        np.concatenate([p.codes for p in parts]),
        np.concatenate([p.scales for p in parts]),
        np.concatenate(zero_points) if zero_points else None,
        scheme,
    )


def diagonal_blocks(hessian: FloatArray, scheme: WeightScheme) -> FloatArray:
    """Return [G, g, g]: the blocks of H that belong to one group each, the last one filled up with zeros."""
    num_inputs = len(hessian)
    group, count = scheme.group_of(num_inputs), scheme.num_groups(num_inputs)
    blocks = np.zeros((count, group, group), dtype=np.float32)
    for index in range(count):
        own = hessian[index * group : (index + 1) * group, index * group : (index + 1) * group]
        blocks[index, : len(own), : len(own)] = own
    return blocks


def _clip_rows(
    weight: FloatArray, scheme: WeightScheme, blocks: FloatArray, options: AlgorithmOptions
) -> QuantizedWeight:
    groups = grouped(weight, scheme)
    best_scales: FloatArray | None = None
    best_zero_points, best_error = None, np.zeros(0, dtype=np.float32)
    for candidate in candidates(groups, scheme, options):
        zero = None if candidate.zero_points is None else candidate.zero_points[:, :, None]
        error = nearest_codes(groups, candidate.scales[:, :, None], zero, scheme)
        if zero is not None:
            error -= zero
        error = error * candidate.scales[:, :, None] - groups
        # [G, N, g] @ [G, g, g]: one small matrix product per group.
        by_group = error.transpose(1, 0, 2)
        harm = ((by_group @ blocks) * by_group).sum(axis=2).T
        if best_scales is None:
            best_scales, best_zero_points, best_error = candidate.scales, candidate.zero_points, harm
            continue
        is_better = harm < best_error
        best_scales = np.where(is_better, candidate.scales, best_scales)
        best_error = np.where(is_better, harm, best_error)
        if best_zero_points is not None and candidate.zero_points is not None:
            best_zero_points = np.where(is_better, candidate.zero_points, best_zero_points)
    assert best_scales is not None
    return encode(groups, best_scales, best_zero_points, scheme, weight.shape[1])


def _diagonal(hessian: FloatArray) -> FloatArray:
    return np.ascontiguousarray(hessian.diagonal()).astype(np.float32)
