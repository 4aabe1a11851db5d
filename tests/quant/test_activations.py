import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qcompile.errors import QuantError
from qcompile.quant.activations import round_per_tensor, round_per_token, search_static_scale
from tests.quant.linears import inputs, statistics_of


@given(arrays(np.float32, (5, 16), elements=st.floats(-1e6, 1e6, width=32)))
def test_a_token_is_off_by_at_most_half_of_its_own_step(x):
    step = np.abs(x.astype(np.float64)).max(axis=1, keepdims=True) / 127
    assert (np.abs(round_per_token(x) - x.astype(np.float64)) <= step * (0.5 + 1e-5) + 1e-35).all()


def test_a_static_scale_is_better_than_covering_everything():
    x = inputs(200, 32)
    x[0, 0] = 1e4
    statistics = statistics_of(x)
    scale = search_static_scale(statistics)
    covering = float(np.abs(x).max()) / 127

    def error(s):
        return ((round_per_tensor(x, s) - x) ** 2).sum()

    assert error(scale) <= error(covering)
    grid = [error(covering * r) for r in np.geomspace(1, 0.02, 60)]
    assert error(scale) == pytest.approx(min(grid))
    assert round_per_tensor(np.array([[1e9, -1e9]], np.float32), 0.5).tolist() == [[63.5, -64.0]]


def test_silent_inputs_have_a_scale_and_missing_ones_are_named():
    assert search_static_scale(statistics_of(np.zeros((4, 8), np.float32))) == 1.0
    statistics = statistics_of(inputs(4, 8))
    statistics.sample = None
    with pytest.raises(QuantError, match="needs a sample"):
        search_static_scale(statistics)
