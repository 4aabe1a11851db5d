"""Fused operators for Ascend NPUs and CUDA GPUs: one Triton source each, a reference, a tile table, a launcher.

    kernels/<operator>/kernel.py     the @triton.jit functions, and nothing else
    kernels/<operator>/reference.py  what the operator means, in PyTorch, in any precision
    kernels/<operator>/launch.py     checks the arguments, chooses a tile, launches
    kernels/<operator>/tiles.toml    tiles for Ascend chips with the on-chip memory each may use (see tile_table.py)

Importing this package needs neither torch nor triton; ``operators`` and ``patch`` need torch, launching needs triton.
"""

import importlib
from typing import Any

OPERATORS = (
    "add_rms_norm",
    "add_layer_norm",
    "head_rms_norm",
    "rope_cache",
    "swiglu",
    "quantize_per_token",
    "add_rms_norm_quantize",
    "matmul_bias_residual",
    "matmul_int8",
    "gemv_int8",
    "gemv_int4",
    "decode_attention",
    "sampler",
)

_LAZY = {"patch": "qcompile.kernels.patching", "unpatch": "qcompile.kernels.patching"}


def __getattr__(name: str) -> Any:
    """Import what needs torch only when it is asked for."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
