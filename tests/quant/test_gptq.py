import numpy as np
import pytest

from qcompile.errors import QuantError
from qcompile.quant import AlgorithmOptions, InputStatistics, WeightScheme, quantize_weight, weight_quantizer
from qcompile.quant.gptq import GptqFactor
from qcompile.quant.mse import search_scales
from qcompile.quant.output_error import output_error, relative_output_error
from tests.quant.linears import inputs, statistics_of, weight

K = 48
SCHEMES = [
    WeightScheme(4, 16),
    WeightScheme(4, 16, symmetric=False),
    WeightScheme(4, 20),
    WeightScheme(4),
    WeightScheme(8, 16, symmetric=False),
]


def algorithm_1(matrix, hessian, order, scales, zeros, scheme, damping):
    """Round as Frantar et al. 2022 write it: update all columns to come, with rows of the Cholesky factor of H^-1."""
    work = matrix[:, order].astype(np.float64)
    damped = hessian.astype(np.float64) + damping * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    upper = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).T
    codes = np.zeros_like(work)
    group = scheme.group_of(len(hessian))
    low, high = scheme.code_range
    for column in range(work.shape[1]):
        scale = scales[:, order[column] // group].astype(np.float64)
        zero = 0 if zeros is None else zeros[:, order[column] // group]
        codes[:, column] = np.clip(np.rint(work[:, column] / scale) + zero, low, high)
        error = (work[:, column] - (codes[:, column] - zero) * scale) / upper[column, column]
        work[:, column + 1 :] -= np.outer(error, upper[column, column + 1 :])
    result = np.zeros_like(codes)
    result[:, order] = codes
    return result


@pytest.mark.parametrize("block_size", [7, 128])
@pytest.mark.parametrize("scheme", SCHEMES, ids=WeightScheme.describe)
def test_codes_are_those_of_the_papers_algorithm(scheme, block_size):
    matrix, statistics = weight(12, K), statistics_of(inputs(300, K))
    options = AlgorithmOptions(block_size=block_size, sweeps=0)
    found = quantize_weight(matrix, scheme, "gptq", statistics, options=options)
    diagonal = np.diag(statistics.hessian)
    order = np.argsort(-diagonal, kind="stable")
    scales, zeros = search_scales(matrix, scheme, options)
    assert np.allclose(scales, found.scales, rtol=1e-5)
    wanted = algorithm_1(matrix, statistics.hessian, order, found.scales, zeros, scheme, 0.01)
    assert (found.codes == wanted).mean() > 0.999


@pytest.mark.parametrize("block_size", [5, 16, 24, 128])
def test_without_act_order_the_scales_of_a_group_come_from_its_corrected_weights(block_size):
    """The same loop as above, in the inputs' own order, with a search at the first column of each group."""
    matrix, statistics = weight(6, K), statistics_of(inputs(300, K))
    scheme, options = WeightScheme(4, 16), AlgorithmOptions(act_order=False, block_size=block_size, sweeps=0)
    found = quantize_weight(matrix, scheme, "gptq", statistics, options=options)
    diagonal = np.diag(statistics.hessian)
    damped = statistics.hessian.astype(np.float64) + 0.01 * diagonal.mean() * np.eye(K)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    work, codes, columns = matrix.astype(np.float64), np.zeros((6, K)), []
    for column in range(K):
        if column % 16 == 0:
            part = work[:, column : column + 16].astype(np.float32)
            scale, _ = search_scales(part, WeightScheme(4), options)
            columns.append(scale[:, 0])
        codes[:, column] = np.clip(np.rint(work[:, column] / columns[-1]), -8, 7)
        error = (work[:, column] - codes[:, column] * columns[-1]) / upper[column, column]
        work[:, column + 1 :] -= np.outer(error, upper[column, column + 1 :])
    assert (found.codes == codes).mean() > 0.99
    assert np.allclose(found.scales, np.stack(columns, axis=1), rtol=1e-3)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES, ids=WeightScheme.describe)
def test_outputs_are_closer_than_with_any_rounding_of_the_weights_alone(scheme, act_order):
    matrix, statistics = weight(32, K), statistics_of(inputs(400, K))
    options = AlgorithmOptions(act_order=act_order)
    errors = {
        algorithm: relative_output_error(
            matrix,
            quantize_weight(matrix, scheme, algorithm, statistics, options=options).dequantize(),
            statistics.hessian,
        )
        for algorithm in ("rtn", "mse", "clip", "gptq")
    }
    assert errors["gptq"] < 0.6 * min(errors["mse"], errors["clip"])
    assert errors["mse"] <= errors["rtn"]


def test_the_trace_is_the_squared_difference_of_the_outputs():
    x, matrix = inputs(200, K), weight(5, K)
    other = quantize_weight(matrix, WeightScheme(4)).dequantize()
    wanted = float(((x.astype(np.float64) @ (matrix - other).T) ** 2).sum())
    assert output_error(matrix - other, x.T @ x) == pytest.approx(wanted, rel=1e-4)


def test_inputs_that_were_always_zero_round_by_themselves():
    x, matrix = inputs(300, K), weight(8, K)
    x[:, 7] = 0
    found = quantize_weight(matrix, WeightScheme(4, 16), "gptq", statistics_of(x))
    scale = found.scales[:, 0]
    assert (np.abs(found.dequantize()[:, 7] - matrix[:, 7]) <= np.abs(scale) * 4).all()
    assert np.isfinite(found.dequantize()).all()
    silent = quantize_weight(matrix, WeightScheme(4, 16), "gptq", statistics_of(np.zeros_like(x)))
    assert np.array_equal(silent.codes, quantize_weight(matrix, WeightScheme(4, 16), "mse").codes)


def test_fewer_tokens_than_inputs_still_factor():
    found = quantize_weight(weight(8, K), WeightScheme(4, 16), "gptq", statistics_of(inputs(5, K)))
    assert np.isfinite(found.dequantize()).all()


def test_rows_in_pieces_are_the_rows_of_the_whole_up_to_the_last_bit_of_a_product():
    matrix, statistics = weight(20, K), statistics_of(inputs(300, K))
    scheme = WeightScheme(4, 16)
    quantize, whole = weight_quantizer(scheme, "gptq", statistics), quantize_weight(matrix, scheme, "gptq", statistics)
    pieces = np.concatenate([quantize(matrix[start : start + 6]).dequantize() for start in range(0, 20, 6)])
    assert np.isclose(pieces, whole.dequantize(), atol=1e-6).mean() > 0.99


def test_bad_statistics_are_refused_by_name():
    matrix, scheme = weight(4, 16), WeightScheme(4, 16)
    with pytest.raises(QuantError, match=r"blk.0: 'gptq' needs the inputs' second moments"):
        quantize_weight(matrix, scheme, "gptq", name="blk.0")
    with pytest.raises(QuantError, match=r"blk.0: the calibration saw 8 inputs, the weight has 16"):
        quantize_weight(matrix, scheme, "clip", statistics_of(inputs(10, 8)), name="blk.0")
    statistics = statistics_of(inputs(10, 16))
    statistics.hessian[2, 2] = np.nan
    with pytest.raises(QuantError, match=r"blk.0: input 2 was NaN or infinite"):
        quantize_weight(matrix, scheme, "gptq", statistics, name="blk.0")
    statistics = statistics_of(inputs(10, 16))
    statistics.hessian[2, 3] = np.inf
    with pytest.raises(QuantError, match="NaN or infinite inputs"):
        quantize_weight(matrix, scheme, "gptq", statistics)
    broken = InputStatistics(1, np.ones(16), np.ones(16), -np.ones((16, 16), np.float32) + np.eye(16, dtype=np.float32))
    with pytest.raises(QuantError, match=r"no Cholesky factor at damping 0.01; raise the damping"):
        quantize_weight(matrix, scheme, "gptq", broken)


def test_the_factor_multiplies_back_to_the_damped_matrix():
    hessian = statistics_of(inputs(300, K)).hessian
    factor = GptqFactor.of(hessian, AlgorithmOptions(damping=0.1))
    damped = hessian + 0.1 * np.mean(np.diag(hessian)) * np.eye(K)
    unit = factor.upper + np.eye(K)
    inverse = np.linalg.inv(unit)
    diagonal = inverse @ damped[np.ix_(factor.order, factor.order)] @ inverse.T
    assert np.allclose(diagonal, np.diag(np.diag(diagonal)), atol=1e-3 * np.abs(diagonal).max())
