"""Weights that were rounded to a format of ggml, by its own arithmetic."""

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type


def dequantized(kind: Type, shape: tuple[int, int] = (32, 512), seed: int = 0) -> np.ndarray:
    """Return weights that ggml rounded; K-quants are random blocks, as gguf has no quantizer for them."""
    rng = np.random.default_rng(seed)
    if kind in {Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0}:
        weights = rng.standard_normal(shape).astype(np.float32) * np.float32(0.05)
        return gguf.quants.dequantize(gguf.quants.quantize(weights, kind), kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (shape[0], shape[1] // block, size), dtype=np.uint8)
    at = {Type.Q2_K: (80, 82), Type.Q3_K: (108,), Type.Q6_K: (208,)}.get(kind, (0, 2))
    for offset in at:
        halves = rng.uniform(1e-5, 1e-4, raw.shape[:2]).astype(np.float16)
        raw[:, :, offset : offset + 2] = halves[..., None].view(np.uint8)
    return gguf.quants.dequantize(raw.reshape(shape[0], -1), kind)
