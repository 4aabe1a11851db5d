import numpy as np
import onnx_ir as ir
import pytest

from qcompile.passes.quantize_weights import QuantizedPieces
from qcompile.quant.algorithms import weight_quantizer
from qcompile.quant.scheme import WeightScheme

SCHEME = WeightScheme(4, 32)


def pieces_of(shape, rows):
    return QuantizedPieces("w", shape, ir.DataType.FLOAT, rows, weight_quantizer(SCHEME))


@pytest.mark.parametrize(("shape", "step"), [((896, 4864), 448), ((9728, 896), 3243), ((8, 32), 8), ((3, 5 << 20), 1)])
def test_pieces_are_as_equal_as_can_be(shape, step):
    assert pieces_of(shape, lambda start, stop: np.zeros((stop - start, shape[1]), np.float32)).step == step


def test_what_is_computed_at_once_is_what_comes_piece_by_piece():
    weight = np.random.default_rng(0).standard_normal((1031, 8192)).astype(np.float32)
    streamed, computed = (pieces_of(weight.shape, lambda start, stop: weight[start:stop]) for _ in range(2))
    assert 1 < streamed.step < len(weight)
    computed.compute()
    whole = weight_quantizer(SCHEME)(weight)
    for pieces in (streamed, computed):
        assert np.array_equal(pieces.codes(packed=False).numpy(), whole.codes)
        assert np.array_equal(pieces.scales(256).numpy(), whole.scales)
