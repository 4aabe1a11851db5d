import numpy as np
import pytest

from qcompile.errors import QuantError
from qcompile.quant import WeightScheme, quantize_weight
from qcompile.quant.activations import round_per_token
from qcompile.quant.awq import search_scale
from qcompile.quant.folding import (
    divide_norm,
    divide_outputs,
    multiply_inputs,
    own_value_channels,
    share_over_query_heads,
)
from qcompile.quant.smooth import search_smoothing, smoothing_scale
from tests.quant.linears import inputs, statistics_of, weight

K = 64


def outlier_inputs(num_tokens=300):
    x = np.random.default_rng(5).standard_normal((num_tokens, K)).astype(np.float32)
    x[:, [3, 20, 41]] *= 60
    return x


def obvious_awq(matrices, x, scheme, num_steps):
    """Return (alpha, error) of the best exponent, from the outputs themselves."""
    mean = np.maximum(np.abs(x).mean(axis=0), 1e-4).astype(np.float64)
    errors = {}
    for step in range(num_steps + 1):
        scale = mean ** (step / num_steps)
        scale = scale / np.sqrt(scale.max() * scale.min())
        errors[step / num_steps] = sum(
            ((x @ (quantize_weight(w * scale, scheme).dequantize() / scale - w).T) ** 2).sum() for w in matrices
        )
    best = min(errors, key=errors.get)
    return best, errors[best] / errors[0.0]


@pytest.mark.parametrize("scheme", [WeightScheme(4, 32), WeightScheme(4, 32, symmetric=False), WeightScheme(4)])
def test_the_scale_is_the_one_of_the_obvious_search(scheme):
    x, matrices = inputs(200, K), [weight(20, K), weight(9, K, seed=4)]
    choice = search_scale(matrices, scheme, statistics_of(x), num_steps=10)
    alpha, error = obvious_awq(matrices, x, scheme, 10)
    assert choice.alpha == pytest.approx(alpha)
    assert choice.error == pytest.approx(error, rel=1e-2)
    assert choice.error <= 1


def test_strong_channels_gain_from_it():
    choice = search_scale([weight(64, K)], WeightScheme(4, 32), statistics_of(outlier_inputs()))
    assert choice.error < 0.5
    assert choice.scale[3] > 3 * np.median(choice.scale)
    assert not choice.is_plain


def test_inputs_that_are_all_alike_gain_nothing():
    x = np.sign(np.random.default_rng(0).standard_normal((200, K))).astype(np.float32)
    choice = search_scale([weight(16, K)], WeightScheme(8), statistics_of(x))
    assert choice.is_plain
    assert choice.error == 1.0


@pytest.mark.parametrize("search", [search_scale, search_smoothing])
def test_a_shared_scale_agrees_over_the_heads_of_a_group(search):
    def share(scale):
        return share_over_query_heads(scale, 8, 2)

    choice = search([weight(16, K)], WeightScheme(4, 32), statistics_of(outlier_inputs()), share=share)
    groups = choice.scale.reshape(2, 4, 8)
    assert not choice.is_plain
    assert (groups == groups[:, :1]).all()
    assert np.array_equal(own_value_channels(choice.scale, 8, 2), groups[:, 0].reshape(-1))


def test_smoothing_lowers_the_error_of_rounded_activations():
    x, matrix, scheme = outlier_inputs(), weight(48, K), WeightScheme(8)
    choice = search_smoothing([matrix], scheme, statistics_of(x))
    wanted = x @ matrix.T

    def error(scale):
        return (
            (round_per_token(x / scale) @ quantize_weight(matrix * scale, scheme).dequantize().T - wanted) ** 2
        ).sum()

    assert error(choice.scale) < 0.3 * error(np.ones(K, np.float32))
    assert choice.error == pytest.approx(error(choice.scale) / error(np.ones(K, np.float32)), rel=1e-2)
    tried = [error(smoothing_scale(np.abs(x).max(axis=0), np.abs(matrix).max(axis=0), a)) for a in (0.3, 0.5, 0.7)]
    assert error(choice.scale) <= min(tried) * 1.001


def test_the_smoothing_scale_is_the_papers_up_to_a_constant():
    x, w = np.array([4.0, 1.0, 100.0], np.float32), np.array([1.0, 2.0, 0.5], np.float32)
    scale = smoothing_scale(x, w, 0.75)
    wanted = x**0.75 / w**0.25
    assert np.allclose(scale / scale[0], wanted / wanted[0], rtol=1e-5)
    assert np.isfinite(smoothing_scale(np.zeros(3, np.float32), w, 0.5)).all()


def test_folding_changes_nothing_in_float():
    rng = np.random.default_rng(0)
    x, gamma = rng.standard_normal((5, K)), rng.uniform(0.5, 2, K)
    matrix, scale = rng.standard_normal((7, K)), rng.uniform(0.1, 10, K).astype(np.float32)
    assert np.allclose((x * divide_norm(gamma, scale)) @ multiply_inputs(matrix, scale).T, (x * gamma) @ matrix.T)
    before, bias = rng.standard_normal((K, 11)), rng.standard_normal(K)
    divided, divided_bias = divide_outputs(before, bias, scale)
    z = rng.standard_normal((5, 11))
    wanted = (z @ before.T + bias) @ matrix.T
    assert np.allclose((z @ divided.T + divided_bias) @ multiply_inputs(matrix, scale).T, wanted)
    assert divide_outputs(before, None, scale)[1] is None


def test_folding_into_values_survives_the_mixing_of_tokens():
    rng = np.random.default_rng(1)
    heads, kv_heads, size = 4, 2, 8
    z, value = rng.standard_normal((6, 10)), rng.standard_normal((kv_heads * size, 10))
    output, mix = rng.standard_normal((10, heads * size)), rng.random((heads, 6, 6))
    scale = share_over_query_heads(rng.uniform(0.1, 10, heads * size).astype(np.float32), heads, kv_heads)

    def run(value, output):
        v = np.repeat((z @ value.T).reshape(6, kv_heads, size), heads // kv_heads, axis=1)
        return np.einsum("hst,thd->shd", mix, v).reshape(6, -1) @ output.T

    folded, _ = divide_outputs(value, None, own_value_channels(scale, heads, kv_heads))
    assert np.allclose(run(folded, multiply_inputs(output, scale)), run(value, output))


def test_statistics_follow_a_folded_scale():
    x, scale = inputs(100, K), np.random.default_rng(0).uniform(0.2, 5, K).astype(np.float32)
    scaled, wanted = statistics_of(x).scaled(scale), statistics_of(x / scale)
    assert np.allclose(scaled.abs_max, wanted.abs_max, rtol=1e-4)
    assert np.allclose(scaled.abs_mean, wanted.abs_mean, rtol=1e-4)
    assert np.allclose(scaled.hessian, wanted.hessian, rtol=1e-3, atol=1e-2)
    assert np.allclose(scaled.sample, wanted.sample, rtol=1e-4)


def test_bad_input_is_refused_by_name():
    statistics = statistics_of(inputs(50, K))
    with pytest.raises(QuantError, match=r"up_proj: row 0 has NaN"):
        search_scale([np.full((2, K), np.nan)], WeightScheme(4), statistics, name="up_proj")
    statistics.sample[4, 9] = np.inf
    with pytest.raises(QuantError, match=r"up_proj: input 9 was NaN or infinite"):
        search_smoothing([weight(4, K)], WeightScheme(8), statistics, name="up_proj")
    statistics.sample = None
    with pytest.raises(QuantError, match=r"up_proj: smoothing needs a sample"):
        search_smoothing([weight(4, K)], WeightScheme(8), statistics, name="up_proj")
    with pytest.raises(QuantError, match="positive and finite"):
        divide_norm(np.ones(3), np.array([1, 0, 2], np.float32))
    with pytest.raises(QuantError, match="does not fit axis 1"):
        multiply_inputs(np.ones((3, 4)), np.ones(3, np.float32))
    with pytest.raises(QuantError, match="64 channels are not 5 heads"):
        share_over_query_heads(np.ones(64, np.float32), 5, 5)
