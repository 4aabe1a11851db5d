"""Quantized projections on ONNX Runtime's kernels, against their definitions."""

import numpy as np

from qcompile.passes.lower_quantized_activations_to_ort import LowerQuantizedActivationsToOrt
from qcompile.passes.lower_quantized_blocks_to_ort import LowerQuantizedBlocksToOrt
from tests.passes.six_tests import Example, NearMiss, SixTests

X, Y = "float[batch_size, sequence_length, 64]", "float[batch_size, sequence_length, 24]"
IDS = "int64[batch_size, sequence_length] input_ids"
SIGNATURE = f"({X} x) => ({Y} y)"
LOOKED_UP = f"({IDS}) => ({X} y)"
RNG = np.random.default_rng(5)
INT8 = RNG.integers(-127, 128, (24, 64)).astype(np.int8)
INT4 = RNG.integers(0, 256, (24, 32)).astype(np.uint8)
WEIGHTS = {
    "w8": INT8,
    "w4": INT4,
    "zeros": RNG.integers(0, 256, (24, 1)).astype(np.uint8),
    "scales": RNG.random((24, 2)).astype(np.float32),
}
CHANNELS = {"w": np.ascontiguousarray(INT8.T), "scales": RNG.random(24).astype(np.float32)}
# The kernel rounds activations to 8 bits.
ROUNDED = {"float": 3e-2}
EXACT_SUMS = {"float": 2e-4, "float16": 4e-3}


def blocked(name, operator, operands, used, signature=SIGNATURE, dtypes=("float",)):
    weights = {key: WEIGHTS[key] for key in used}
    before = f"{signature} {{ y = qcompile.{operator}<block_size = 32>({operands}) }}"
    return Example(name, before, None, weights, dtypes=dtypes)


class TestLowerQuantizedBlocks(SixTests):
    pass_class = LowerQuantizedBlocksToOrt
    limits = ROUNDED
    examples = (
        blocked("8 bits", "LinearW8", "x, w8, scales", ("w8", "scales")),
        blocked("4 bits", "LinearW4", "x, w4, scales", ("w4", "scales")),
        blocked("4 bits with zero points", "LinearW4Asymmetric", "x, w4, scales, zeros", ("w4", "scales", "zeros")),
        blocked("8-bit table", "EmbeddingW8", "input_ids, w8, scales", ("w8", "scales"), LOOKED_UP),
        blocked("4-bit table", "EmbeddingW4", "input_ids, w4, scales", ("w4", "scales"), LOOKED_UP),
    )
    near_misses = (
        NearMiss(
            "a block the kernel does not take",
            f"{SIGNATURE} {{ y = qcompile.LinearW8<block_size = 8>(x, w8, scales) }}",
            "not 8",
            {"w8": INT8, "scales": RNG.random((24, 8)).astype(np.float32)},
        ),
        NearMiss("a float projection", f"{SIGNATURE} {{ y = MatMul(x, w) }}", None, {"w": (64, 24)}),
    )
    counts = (("qwen2-builder", 10), ("qwen3-builder", 10))


class TestLowerQuantizedActivations(SixTests):
    pass_class = LowerQuantizedActivationsToOrt
    limits = EXACT_SUMS
    examples = (
        Example("per token", f"{SIGNATURE} {{ y = qcompile.LinearW8A8(x, w, scales) }}", None, CHANNELS),
        Example(
            "one step",
            f"{SIGNATURE} {{ y = qcompile.LinearW8A8Static(x, w, scales, step) }}",
            None,
            {**CHANNELS, "step": np.array(0.03125, np.float32)},
        ),
    )
    near_misses = (NearMiss("a float projection", f"{SIGNATURE} {{ y = MatMul(x, w) }}", None, {"w": (64, 24)}),)
    counts = (("qwen2-builder", 0),)
