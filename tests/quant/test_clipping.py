import numpy as np
import pytest

from qcompile.quant import AlgorithmOptions, WeightScheme, quantize_weight
from qcompile.quant.clipping import diagonal_blocks
from qcompile.quant.mse import candidates
from qcompile.quant.rtn import encode, grouped
from tests.quant.linears import inputs, statistics_of, weight

K = 48


def harm(matrix, restored, hessian, group):
    """Return the error of each group's share of the outputs [N, G], by its own columns and tokens."""
    difference = (matrix - restored).astype(np.float64)
    found = np.zeros((len(matrix), -(-K // group)))
    for index, start in enumerate(range(0, K, group)):
        part = difference[:, start : start + group]
        found[:, index] = np.diag(part @ hessian[start : start + group, start : start + group] @ part.T)
    return found


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 20])
def test_every_group_takes_the_least_harmful_candidate(group, symmetric):
    matrix, hessian = weight(9, K), statistics_of(inputs(200, K)).hessian
    scheme, options = WeightScheme(4, group, symmetric), AlgorithmOptions(num_steps=10)
    groups = grouped(matrix, scheme)
    tries = [
        harm(matrix, encode(groups, c.scales, c.zero_points, scheme, K).dequantize(), hessian, group)
        for c in candidates(groups, scheme, options)
    ]
    found = quantize_weight(matrix, scheme, "clip", statistics_of(inputs(200, K)), options=options)
    assert np.allclose(harm(matrix, found.dequantize(), hessian, group), np.min(tries, axis=0), rtol=1e-2, atol=1e-6)


def test_wide_groups_weigh_each_input_by_its_square(monkeypatch):
    matrix, statistics = weight(9, K), statistics_of(inputs(200, K))
    monkeypatch.setattr("qcompile.quant.clipping.MAX_BLOCK", 8)
    found = quantize_weight(matrix, WeightScheme(4), "clip", statistics)
    plain = quantize_weight(matrix, WeightScheme(4), "mse")
    weighted = [((q.dequantize() - matrix) ** 2 * np.diag(statistics.hessian)).sum() for q in (found, plain)]
    assert weighted[0] < weighted[1]


def test_blocks_are_cut_from_the_diagonal_and_filled_up_with_zeros():
    hessian = np.arange(25, dtype=np.float32).reshape(5, 5)
    blocks = diagonal_blocks(hessian, WeightScheme(4, 3))
    assert np.array_equal(blocks[0], hessian[:3, :3])
    assert np.array_equal(blocks[1], [[18, 19, 0], [23, 24, 0], [0, 0, 0]])
