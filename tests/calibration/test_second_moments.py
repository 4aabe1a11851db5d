import numpy as np
import pytest

from qcompile.calibration.second_moments import add_moments, mirror, pack_symmetric, packed_bytes, unpack_symmetric


@pytest.mark.parametrize("size", [1, 24, 256, 600])
def test_moments_of_pieces_are_those_of_all_tokens(size):
    x = np.random.default_rng(size).standard_normal((900, size)).astype(np.float32)
    matrix = np.zeros((size, size), np.float32)
    for start in range(0, 900, 350):
        add_moments(matrix, x[start : start + 350])
    wide = x.astype(np.float64)
    # a few units in the last place of the largest sums, some 1,000
    assert np.abs(mirror(matrix) - wide.T @ wide).max() <= 8 * 1000 * 2**-24


@pytest.mark.parametrize("size", [1, 255, 256, 600])
def test_a_symmetric_matrix_survives_packing(size):
    half = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)
    matrix = half + half.T
    packed = pack_symmetric(matrix)
    assert packed.nbytes == packed_bytes(size)
    assert np.array_equal(unpack_symmetric(packed, size), matrix)
    with pytest.raises(ValueError, match="numbers for a matrix"):
        unpack_symmetric(packed[:-1], size)
